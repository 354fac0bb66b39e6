"""The records of `phase: critique` -> what each principle changed, and a page to read them on."""

from __future__ import annotations

import difflib
import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
"""A line of trace.jsonl: `prompt`, `response`, `num_tokens`, `fault`, `rounds`, `revision`."""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --grey: #6b7280; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1300px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } p { max-width: 50em; }
table { border-collapse: collapse; } td, th { padding: .3em .8em;
  border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 1.2em 0; padding: .8em 1em; }
.round { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1em;
  border-top: 1px solid var(--line); padding: .6em 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: var(--soft); padding: .5em .7em; border-radius: 6px; margin-bottom: .6em; }
.label { color: var(--grey); font-size: .82em; }
.fault { color: #b91c1c; } del { color: #b91c1c; } ins { color: #15803d; text-decoration: none;
  border-bottom: 2px solid #15803d88; }
@media (max-width: 800px) { .round { grid-template-columns: 1fr; } }
"""


def by_principle(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """What the rounds under each principle did.

    Args:
      records: of which `num_tokens`, `response` and `rounds` are read.
    Returns:
      Of each principle, by its name: `num_rounds`; `num_failed`, those without a revision;
      `num_changed`, those whose revision differs from the answer before; `share_changed`, of those
      with a revision; `mean_length_change`, tokens, revision less answer before, of the same. The
      last two are None where no round has a revision.
    """
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for before, num_tokens, now in _rounds(record):
            sums = found.setdefault(
                now["principle"],
                {"num_rounds": 0, "num_failed": 0, "num_changed": 0, "length_change": 0},
            )
            sums["num_rounds"] += 1
            if now["fault"] is not None:
                sums["num_failed"] += 1
                continue
            sums["num_changed"] += now["revision"] != before
            sums["length_change"] += now["revision_num_tokens"] - num_tokens
    for sums in found.values():
        num, change = sums["num_rounds"] - sums["num_failed"], sums.pop("length_change")
        sums["share_changed"] = sums["num_changed"] / num if num else None
        sums["mean_length_change"] = change / num if num else None
    return dict(sorted(found.items()))


def critique_page(
    records: Sequence[Record], figures: Mapping[str, Any], path: str | Path, *, title: str
) -> None:
    """Writes a page of HTML: what each principle changed, then answers beside their revisions.

    It is one file, loads nothing and runs nothing; whatever a text holds is shown as text.

    Args:
      records: those to be read, such as the first hundred.
      figures: of all of them; what critique.json holds.
      path: the file to write.
      title: the headline.
    """
    principles = {p["name"]: p for p in figures["constitution"]["principles"]}
    rows = "".join(_row(name, of, principles) for name, of in figures["by_principle"].items())
    head = ("principle", "rounds", "without a revision", "answer changed", "mean change, tokens")
    counts = f"{figures['num_records']} answers to {figures['num_prompts']} prompts, " + (
        f"{figures['num_left_out']} of them left out as nothing revised them; {len(records)} are "
        "shown below. Of a round, what the revision took out is crossed out on the left, and what "
        "it put in is underlined on the right."
    )
    body = (
        f"<h1>{html.escape(title)}</h1><p>{counts}</p>"
        f"<h2>What each principle changed</h2>"
        f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>"
        f"<h2>Answers, critiques and revisions</h2>{''.join(map(_article, records))}"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )
    Path(path).write_bytes(page.encode(errors="backslashreplace"))


def _rounds(record: Record) -> Iterable[tuple[str, int, Mapping[str, Any]]]:
    """Of each round the answer before it, its length in tokens, and the round."""
    answer, num_tokens = record["response"], record["num_tokens"]
    for now in record["rounds"]:
        yield answer, num_tokens, now
        if now["fault"] is None:
            answer, num_tokens = now["revision"], now["revision_num_tokens"]


def _row(name: str, of: Mapping[str, Any], principles: Mapping[str, Any]) -> str:
    asked = principles[name]
    done = of["num_rounds"] - of["num_failed"]
    changed, longer = "", ""
    if done:
        changed = f"{of['num_changed']} of {done} ({of['share_changed']:.0%})"
        longer = f"{of['mean_length_change']:+.1f}"
    texts = _label(f"{asked['critique']}\n{asked['revision']}")
    cells = (f"{html.escape(name)}{texts}", of["num_rounds"], of["num_failed"], changed, longer)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _article(record: Record) -> str:
    names = itertools.chain(["first answer"], itertools.repeat("answer so far"))
    rounds = [
        _round(name, before, now)
        for name, (before, _, now) in zip(names, _rounds(record), strict=False)
    ]
    if not rounds:
        rounds = [f'<div class="round"><div>{_text(record["response"])}</div></div>']
    if record["fault"] is not None:
        rounds.append(_fault(record["fault"]))
    return (
        f'<article><div class="prompt">{_prompt(record["prompt"])}</div>{"".join(rounds)}</article>'
    )


def _round(name: str, before: str, now: Mapping[str, Any]) -> str:
    """The answer before, under its name, the critique and the revision, side by side."""
    revision = now.get("revision")
    left, right = (_text(before), "") if revision is None else _compared(before, revision)
    fault = "" if now["fault"] is None else _fault(now["fault"])
    columns = (
        _label(name) + left,
        _label(f"critique: {now['principle']}") + _text(now.get("critique") or ""),
        _label("revision") + right + fault,
    )
    return f'<div class="round">{"".join(f"<div>{column}</div>" for column in columns)}</div>'


def _compared(before: str, after: str) -> tuple[str, str]:
    """Both texts; the words that are in one alone are marked."""
    old, new = (re.findall(r"\s*\S+|\s+", text) for text in (before, after))
    left, right = "", ""
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for what, a, b, c, d in matcher.get_opcodes():
        one, other = html.escape("".join(old[a:b])), html.escape("".join(new[c:d]))
        left += one if what == "equal" or not one else f"<del>{one}</del>"
        right += other if what == "equal" or not other else f"<ins>{other}</ins>"
    return f'<div class="text">{left}</div>', f'<div class="text">{right}</div>'


def _prompt(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return _text(prompt)
    return "".join(_label(str(m["role"])) + _text(str(m.get("content") or "")) for m in prompt)


def _text(text: str) -> str:
    return f'<div class="text">{html.escape(text)}</div>'


def _label(text: str) -> str:
    return f'<div class="label text">{html.escape(text)}</div>'


def _fault(text: str) -> str:
    return f'<div class="fault">{html.escape(text)}</div>'
