// Requests to the server that made this page. What was not acknowledged is asked again.

const RETRY_MS = 1000;

let session = null;

export class Refused extends Error {}

const trouble = document.getElementById("trouble");

export function tell(message) {
  trouble.textContent = message;
  trouble.hidden = !message;
}

export const element = (id) => document.getElementById(id);

const pause = (ms) => new Promise((wake) => setTimeout(wake, ms));

// The token is in the address once, and has been exchanged for a cookie by now.
export function forgetToken() {
  const here = new URL(location.href);
  if (here.searchParams.has("token")) {
    here.searchParams.delete("token");
    history.replaceState(null, "", here);
  }
}

export async function get(path) {
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, { cache: "no-store" });
    } catch {
      tell("The server does not answer. Trying again …");
      await pause(RETRY_MS);
      continue;
    }
    const body = await answer.json();
    if (!answer.ok) throw new Refused(body.error);
    tell("");
    return body;
  }
}

// A page never goes on with another store than it began with, whatever serves this address now.
export async function openSession() {
  const found = await get("/api/session");
  if (session !== null && session.store !== found.store) {
    throw new Refused("Other prompts are ranked at this address now. Reload the page.");
  }
  session = found;
  return session;
}

export const store = () => session.store;

// One at a time and in order; the same body goes out again until somebody says what became of it.
let last = Promise.resolve();

export function post(path, body) {
  const mine = last.then(() => attempt(path, JSON.stringify(body)));
  last = mine.catch(() => {});
  return mine;
}

async function attempt(path, body) {
  let hasRenewed = false;
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-CSRF-Token": session.csrf },
        body,
        keepalive: true, // A page that is left at once still sends it.
      });
    } catch {
      tell("The server does not answer: your last step is not saved yet. Trying again …");
      await pause(RETRY_MS);
      continue;
    }
    const result = await answer.json();
    if (answer.ok) {
      tell("");
      return result;
    }
    if (answer.status === 403 && !hasRenewed) {
      hasRenewed = true;
      await openSession();
    } else if (answer.status === 503) {
      tell(`${result.error}. Trying again …`);
      await pause(RETRY_MS);
    } else {
      throw new Refused(result.error);
    }
  }
}
