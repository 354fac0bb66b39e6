// The page on which somebody ranks: what is on it, and keys, buttons and drags that change it.

import { Refused, element, forgetToken, openSession, post, tell } from "/static/api.js";
import { makeDraggable } from "/static/drag.js";

const NAME_KEY = "alignjax label: annotator";
const COMMENT_PAUSE_MS = 400;

const state = {
  annotator: null,
  task: null, // what the server sent, or null
  ranks: [], // by the order shown; null where there is none yet
  flagged: false,
  marked: 0,
  history: [], // ranks before each step of this task
  isBusy: false,
};
let cards = [];
let chips = [];
let commentTimer = null;

const letter = (i) => (i < 26 ? String.fromCharCode(65 + i) : `${i + 1}`);
const comment = element("comment");

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text; // Never as HTML: it comes from a model.
  return node;
}

// What is shown.

function show(name) {
  for (const id of ["sign-in", "done", "work"]) element(id).hidden = id !== name;
  element("dock").hidden = name !== "work";
  element("who").hidden = state.annotator === null;
  element("who").textContent = state.annotator ?? "";
}

function showProgress({ ranked, own, tasks }) {
  element("counts").textContent = `${ranked} of ${tasks} ranked`;
  element("counts").append(make("span", "own", ` · ${own} by you`));
  element("bar").max = Math.max(1, tasks);
  element("bar").value = ranked;
}

function receive(found) {
  showProgress(found.progress);
  state.annotator = found.annotator;
  localStorage.setItem(NAME_KEY, found.annotator);
  if (found.task === null) {
    state.task = null;
    element("done-text").textContent =
      `You ranked ${found.progress.own} of ${found.progress.tasks} prompts. Thank you.`;
    show("done");
    return;
  }
  const draft = found.draft ?? { ranks: found.responses.map(() => null), comment: "", flagged: false };
  state.task = found;
  state.ranks = [...draft.ranks];
  state.flagged = draft.flagged;
  state.history = [];
  comment.value = draft.comment;
  element("comment-box").hidden = draft.comment === "";
  build();
  show("work");
  const free = state.ranks.indexOf(null);
  mark(Math.max(0, free), { scrolls: false });
  window.scrollTo(0, 0);
  update();
}

function build() {
  const { prompt, responses } = state.task;
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
  cards = responses.map(buildCard);
  element("cards").replaceChildren(...cards);
  chips = responses.map((_, i) => {
    const chip = make("span", "chip", letter(i));
    chip.dataset.response = i;
    makeDraggable(chip, drop, () => mark(i));
    return chip;
  });
  const slots = [makeSlot(null, "not ranked")];
  for (let rank = 1; rank <= responses.length; rank += 1) {
    slots.push(makeSlot(rank, rank === 1 ? "best" : rank === responses.length ? "worst" : ""));
  }
  element("board").replaceChildren(...slots);
}

function buildCard(response, i) {
  const card = make("article", "card");
  card.tabIndex = -1;
  card.dataset.response = i;
  const head = make("div", "card-head");
  const handle = make("span", "chip handle", letter(i));
  handle.title = "Drag to a rank below";
  makeDraggable(handle, drop, () => mark(i));
  const group = make("div", "rank-buttons");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", `Rank of response ${letter(i)}`);
  state.ranks.forEach((_, r) => {
    const button = make("button", "", `${r + 1}`);
    button.type = "button";
    button.addEventListener("click", () => {
      mark(i);
      setRank(i, state.ranks[i] === r + 1 ? null : r + 1);
    });
    group.append(button);
  });
  head.append(handle, group);
  const text = make("p", "text", response);
  text.dir = "auto";
  card.append(head, text);
  card.addEventListener("click", () => mark(i, { scrolls: false }));
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

function update() {
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
  element("comment-button").setAttribute("aria-pressed", String(comment.value !== ""));
}

function mark(i, { scrolls = true } = {}) {
  state.marked = i;
  update();
  if (!element("work").contains(document.activeElement) || document.activeElement !== comment) {
    cards[i].focus({ preventScroll: true });
  }
  if (scrolls) cards[i].scrollIntoView({ block: "nearest" });
}

let toastTimer = null;
function toast(text) {
  clearTimeout(toastTimer);
  element("toast").textContent = text;
  toastTimer = setTimeout(() => {
    element("toast").textContent = "";
  }, 2500);
}

// What somebody does.

function drop(i, slot) {
  setRank(i, slot === "" ? null : Number(slot));
}

function setRank(i, rank) {
  if (state.isBusy || state.ranks[i] === rank) return;
  state.history.push([...state.ranks]);
  state.ranks[i] = rank;
  update();
  saveDraft();
}

function rankMarked(rank) {
  if (rank > state.ranks.length) return;
  setRank(state.marked, rank);
  const num = state.ranks.length;
  for (let step = 1; step < num; step += 1) {
    const next = (state.marked + step) % num;
    if (state.ranks[next] === null) {
      mark(next);
      return;
    }
  }
}

const asked = (more) => ({ annotator: state.annotator, request: crypto.getRandomValues(new Uint32Array(4)).join("-"), ...more });

const chosen = () => ({
  task: state.task.task, ranks: state.ranks, comment: comment.value, flagged: state.flagged,
});

function saveDraft() {
  clearTimeout(commentTimer);
  commentTimer = null;
  post("/api/draft", asked(chosen())).catch((error) => tell(error.message));
}

async function finish(path, body, said) {
  if (state.isBusy) return;
  state.isBusy = true;
  document.body.classList.add("busy");
  clearTimeout(commentTimer);
  commentTimer = null;
  try {
    receive(await post(path, asked(body)));
    toast(said);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    tell(error.message);
  } finally {
    state.isBusy = false;
    document.body.classList.remove("busy");
  }
}

function submit() {
  if (state.ranks.includes(null)) {
    toast("Every response needs a rank first");
    mark(state.ranks.indexOf(null));
    return;
  }
  finish("/api/rank", chosen(), "Saved");
}

function skip() {
  finish("/api/skip", { ...chosen(), ranks: null }, "Skipped");
}

function undo() {
  if (state.task !== null && state.history.length > 0) {
    state.ranks = state.history.pop();
    update();
    saveDraft();
  } else {
    finish("/api/undo", {}, "Taken back");
  }
}

function toggleFlag() {
  state.flagged = !state.flagged;
  update();
  saveDraft();
}

function openComment() {
  element("comment-box").hidden = false;
  comment.focus();
  comment.scrollIntoView({ block: "nearest" });
}

function leaveComment() {
  element("comment-box").hidden = comment.value === "";
  mark(state.marked, { scrolls: false });
  cards[state.marked].focus({ preventScroll: true });
}

function toggleHelp() {
  const help = element("help");
  if (help.open) help.close();
  else help.showModal();
}

const KEYS = {
  Enter: submit, s: skip, f: toggleFlag, c: openComment, u: undo,
  Backspace: () => setRank(state.marked, null),
  Delete: () => setRank(state.marked, null),
  ArrowDown: () => mark((state.marked + 1) % cards.length),
  ArrowUp: () => mark((state.marked + cards.length - 1) % cards.length),
};
KEYS.j = KEYS.ArrowRight = KEYS.ArrowDown;
KEYS.k = KEYS.ArrowLeft = KEYS.ArrowUp;

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target === comment) {
    if (event.key === "Escape") leaveComment();
    return;
  }
  if (event.target instanceof HTMLInputElement) return;
  if (event.key === "?") toggleHelp();
  else if (element("help").open || state.isBusy) return;
  else if (state.task === null) {
    if (event.key !== "u" || element("done").hidden) return;
    undo();
  } else if (/^[1-9]$/.test(event.key)) {
    rankMarked(Number(event.key));
  } else {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const isOnButton = event.target.closest("button, a") !== null;
    if (!(key in KEYS) || event.repeat || (isOnButton && key === "Enter")) return;
    KEYS[key]();
  }
  event.preventDefault();
});

// A button that was pressed with the mouse must not take the next Enter.
document.addEventListener("mousedown", (event) => {
  if (event.target.closest("button")) event.preventDefault();
});

for (const [id, act] of Object.entries({
  submit, skip, undo, flag: toggleFlag, "comment-button": openComment, "help-button": toggleHelp,
  "done-undo": undo,
})) {
  element(id).addEventListener("click", act);
}

comment.addEventListener("input", () => {
  update();
  clearTimeout(commentTimer);
  commentTimer = setTimeout(saveDraft, COMMENT_PAUSE_MS);
});

element("who").addEventListener("click", () => {
  localStorage.removeItem(NAME_KEY);
  location.reload();
});

// Who it is.

async function signIn(name) {
  try {
    receive(await post("/api/task", { annotator: name }));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    localStorage.removeItem(NAME_KEY);
    show("sign-in");
    element("name").value = name;
    element("sign-in-error").textContent = error.message;
  }
}

element("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  signIn(element("name").value);
});

async function start() {
  forgetToken();
  try {
    const { annotators } = await openSession();
    element("names").replaceChildren(
      ...annotators.map((name) => {
        const option = make("option");
        option.value = name;
        return option;
      }),
    );
  } catch (error) {
    tell(error.message);
    return;
  }
  const name = localStorage.getItem(NAME_KEY);
  if (name === null) {
    show("sign-in");
    element("name").focus();
  } else {
    await signIn(name);
  }
}

start();
