// A prompt, its responses as cards, and the board of ranks: built for a task, painted for a state.

import { element } from "/static/api.js";
import { makeDraggable } from "/static/drag.js";

export let cards = [];
let chips = [];

const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : `${i + 1}`);

export function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text; // Never as HTML: it comes from a model.
  return node;
}

// `act` has drop(response, slot), press(response) and choose(response, rank).
export function build({ prompt, responses }, act) {
  const messages = typeof prompt === "string" ? [{ role: "prompt", content: prompt }] : prompt;
  element("prompt").replaceChildren(
    ...messages.map((message) => {
      const part = make("div", `message ${message.role === "assistant" ? "theirs" : ""}`);
      part.append(make("h2", "role", message.role));
      const text = make("p", "text", message.content ?? "");
      text.dir = "auto";
      part.append(text);
      if (message.tool_calls) {
        part.append(make("pre", "text", JSON.stringify(message.tool_calls, null, 2)));
      }
      return part;
    }),
  );
  cards = responses.map((text, i) => buildCard(text, i, responses.length, act));
  element("cards").replaceChildren(...cards);
  chips = responses.map((_, i) => {
    const chip = make("span", "chip", letter(i));
    chip.dataset.response = i;
    makeDraggable(chip, act.drop, () => act.press(i));
    return chip;
  });
  const slots = [makeSlot(null, "not ranked")];
  for (let rank = 1; rank <= responses.length; rank += 1) {
    slots.push(makeSlot(rank, rank === 1 ? "best" : rank === responses.length ? "worst" : ""));
  }
  element("board").replaceChildren(...slots);
}

function buildCard(response, i, num, act) {
  const card = make("article", "card");
  card.tabIndex = -1;
  card.dataset.response = i;
  const head = make("div", "card-head");
  const handle = make("span", "chip handle", letter(i));
  handle.title = "Drag to a rank below";
  makeDraggable(handle, act.drop, () => act.press(i));
  const group = make("div", "rank-buttons");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `Rank of response ${letter(i)}`);
  for (let rank = 1; rank <= num; rank += 1) {
    const button = make("button", "", `${rank}`);
    button.type = "button";
    button.addEventListener("click", () => act.choose(i, rank));
    group.append(button);
  }
  head.append(handle, group);
  const text = make("p", "text", response);
  text.dir = "auto";
  card.append(head, text);
  card.addEventListener("click", () => act.press(i));
  return card;
}

function makeSlot(rank, hint) {
  const slot = make("div", rank === null ? "slot tray" : "slot");
  slot.dataset.slot = rank ?? "";
  const label = make("span", "slot-label", rank === null ? "" : `${rank}`);
  if (hint) label.append(make("span", "hint", rank === null ? hint : ` ${hint}`));
  slot.append(label, make("span", "slot-chips"));
  return slot;
}

export function paint(state) {
  const slots = [...element("board").children];
  chips.forEach((chip, i) => {
    const room = slots[state.ranks[i] ?? 0].querySelector(".slot-chips");
    if (chip.parentNode !== room) room.append(chip);
    const isMarked = i === state.marked;
    chip.classList.toggle("marked", isMarked);
    cards[i].classList.toggle("marked", isMarked);
    cards[i].classList.toggle("ranked", state.ranks[i] !== null);
    cards[i].querySelectorAll("button").forEach((button, r) => {
      button.setAttribute("aria-pressed", String(state.ranks[i] === r + 1));
    });
  });
  const left = state.ranks.filter((rank) => rank === null).length;
  element("submit").disabled = left > 0;
  element("submit").title = left > 0 ? `${left} without a rank` : "";
  element("flag").setAttribute("aria-pressed", String(state.flagged));
  element("comment-button").setAttribute("aria-pressed", String(element("comment").value !== ""));
}
