// The page on which somebody ranks: what is on it, and keys, buttons and drags that change it.

import { Refused, element, forgetToken, openSession, post, store, tell } from "/static/api.js";
import { build, cards, make, paint } from "/static/board.js";

const NAME_KEY = "alignjax label: annotator";
const DRAFT_KEY = "alignjax label: not acknowledged yet";
const COMMENT_PAUSE_MS = 400;
const TOAST_MS = 4000;

const state = {
  annotator: null,
  task: null, // what the server sent, or null
  ranks: [], // by the order shown; null where there is none yet
  flagged: false,
  marked: 0,
  history: [], // ranks before each step of this task
  isBusy: false,
};
let commentTimer = null;

const comment = element("comment");

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
  const empty = { ranks: found.responses.map(() => null), comment: "", flagged: false };
  const left = unacknowledged(found.task);
  const draft = left ?? found.draft ?? empty;
  state.task = found;
  state.ranks = [...draft.ranks];
  state.flagged = draft.flagged;
  state.history = [];
  comment.value = draft.comment;
  element("comment-box").hidden = draft.comment === "";
  build(found, { drop, press, choose });
  show("work");
  const free = state.ranks.indexOf(null);
  mark(Math.max(0, free), { scrolls: false });
  window.scrollTo(0, 0);
  paint(state);
  if (left !== null) saveDraft();
}

function mark(i, { scrolls = true } = {}) {
  state.marked = i;
  paint(state);
  if (document.activeElement !== comment) cards[i].focus({ preventScroll: true });
  if (scrolls) cards[i].scrollIntoView({ block: "nearest" });
}

let toastTimer = null;
function toast(text) {
  clearTimeout(toastTimer);
  element("toast").textContent = text;
  toastTimer = setTimeout(() => {
    element("toast").textContent = "";
  }, TOAST_MS);
}

// What somebody does.

function drop(i, slot) {
  setRank(i, slot === "" ? null : Number(slot));
}

function press(i) {
  mark(i, { scrolls: false });
}

function choose(i, rank) {
  press(i);
  setRank(i, state.ranks[i] === rank ? null : rank);
}

function setRank(i, rank) {
  if (state.isBusy || state.ranks[i] === rank) return;
  state.history.push([...state.ranks]);
  state.ranks[i] = rank;
  paint(state);
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

const asked = (more) => ({
  annotator: state.annotator,
  request: crypto.getRandomValues(new Uint32Array(4)).join("-"),
  ...more,
});

const chosen = () => ({
  task: state.task.task, ranks: state.ranks, comment: comment.value, flagged: state.flagged,
});

// What the server has not acknowledged is kept here, for a page that is left before it does.
function keep() {
  const body = asked(chosen());
  localStorage.setItem(DRAFT_KEY, JSON.stringify({ store: store(), ...body }));
  return body;
}

function unacknowledged(task) {
  const body = JSON.parse(localStorage.getItem(DRAFT_KEY));
  const isMine = body?.store === store() && body?.annotator === state.annotator;
  return isMine && body.task === task ? body : null;
}

function forget(request) {
  const body = JSON.parse(localStorage.getItem(DRAFT_KEY));
  if (request === undefined || body?.request === request) localStorage.removeItem(DRAFT_KEY);
}

async function saveDraft() {
  clearTimeout(commentTimer);
  commentTimer = null;
  const body = keep();
  try {
    await post("/api/draft", body);
    forget(body.request);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    tell(error.message);
  }
}

async function finish(path, body, said = () => "Saved") {
  if (state.isBusy) return;
  saveComment();
  state.isBusy = true;
  document.body.classList.add("busy");
  try {
    const found = await post(path, asked(body));
    forget();
    receive(found);
    toast(said(found));
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
  finish("/api/rank", chosen());
}

function skip() {
  finish("/api/skip", { ...chosen(), ranks: null }, () => "Skipped");
}

function undo() {
  if (state.task !== null && state.history.length > 0) {
    state.ranks = state.history.pop();
    paint(state);
    saveDraft();
  } else {
    finish("/api/undo", {}, ({ undone }) =>
      undone === null ? "There is nothing to take back" : "Taken back");
  }
}

function toggleFlag() {
  state.flagged = !state.flagged;
  paint(state);
  saveDraft();
}

function openComment() {
  element("comment-box").hidden = false;
  comment.focus();
  comment.scrollIntoView({ block: "nearest" });
}

function saveComment() {
  if (commentTimer !== null) saveDraft();
}

function leaveComment() {
  saveComment();
  element("comment-box").hidden = comment.value === "";
  comment.blur();
  mark(state.marked, { scrolls: false });
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
  paint(state);
  keep();
  clearTimeout(commentTimer);
  commentTimer = setTimeout(saveDraft, COMMENT_PAUSE_MS);
});

comment.addEventListener("blur", saveComment);

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
