// How far everybody is.

import { element, forgetToken, get, tell } from "/static/api.js";

const PERIOD_MS = 5000;

function show(found) {
  element("counts").textContent = `${found.ranked} of ${found.tasks} ranked`;
  element("bar").max = Math.max(1, found.tasks);
  element("bar").value = found.ranked;
  const { alpha, num_tasks, num_annotators } = found.agreement;
  element("alpha").textContent = alpha === null ? "–" : alpha.toFixed(2).replace("-", "−");
  element("alpha-text").textContent =
    alpha === null
      ? "Not known yet: it takes two people who ranked the same prompt, and not all as ties."
      : `From ${num_tasks} ${num_tasks === 1 ? "prompt" : "prompts"} that two or more people ` +
        `ranked, ${num_annotators} people in all.`;
  const rows = found.annotators.map((person) => {
    const row = document.createElement("tr");
    for (const text of [person.name, person.ranked, person.skipped, person.flagged]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      row.append(cell);
    }
    return row;
  });
  element("people").tBodies[0].replaceChildren(...rows);
  element("people").hidden = rows.length === 0;
}

async function refresh() {
  try {
    show(await get("/api/progress"));
  } catch (error) {
    tell(error.message);
  }
  setTimeout(refresh, PERIOD_MS);
}

forgetToken();
refresh();
