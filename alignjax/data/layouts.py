"""The layouts in which others keep preferences <-> `Preference`, each a pair of functions.

A layout is found by the keys of the first record, or named. What one cannot hold is an error when
it is written, never left out.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from alignjax.core.errors import UserError
from alignjax.data.columns import (
    from_demonstration,
    from_implicit,
    from_pairs,
    from_unpaired,
    to_demonstration,
    to_implicit,
    to_pairs,
    to_unpaired,
)
from alignjax.data.native import from_native, made, noted, taken, to_native
from alignjax.data.preferences import Faulty, Preference, Preferences, check
from alignjax.data.schema import kind
from alignjax.data.sources import Record, open_source
from alignjax.data.transcripts import HUMAN, from_hh, is_transcript, to_hh


@dataclass(frozen=True)
class Layout:
    """How records are written down."""

    form: str
    """What a record looks like, for messages."""
    fits: Callable[[Record], bool]
    """Whether a record looks like that; a key whose value is null is not there."""
    read: Callable[[Record], Preference]
    """Raises UserError without the place of the record."""
    write: Callable[[Preference], list[Record]]
    """The records of a preference; raises UserError if they cannot hold it."""


def open_preferences(
    spec: str | list[str],
    layout: str = "auto",
    *,
    annotators: Collection[str] | None = None,
    faulty: Faulty = "error",
) -> Preferences:
    """Checked preferences of files; see `open_source`.

    Args:
      spec: one source or several, of one layout.
      layout: of `LAYOUTS`; "auto" goes by the keys of the first record.
      annotators, faulty: as for `Preferences`.
    Raises:
      UserError: if the layout is unknown or ambiguous, and as `Preferences`.
    """
    source = open_source(spec)
    if layout == "auto":
        try:
            layout = detect(source[0])
        except UserError as error:
            raise UserError(f"{source.where(0)}: {error}") from error
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown; expected auto or {', '.join(LAYOUTS)}")
    return Preferences(source, LAYOUTS[layout].read, annotators=annotators, faulty=faulty)


def detect(record: Record) -> str:
    """The name of the layout that a record is in. Raises UserError if none or several fit."""
    found = [name for name, layout in LAYOUTS.items() if layout.fits(record)]
    if len(found) == 1:
        return found[0]
    present = [key for key, value in record.items() if value is not None]
    there = f"fields there: {', '.join(present) or 'none'}"
    if found:
        raise UserError(f"the layout may be {' or '.join(found)} ({there}); name one as layout")
    known = "; ".join(f"{name}: {layout.form}" for name, layout in LAYOUTS.items())
    raise UserError(f"no known layout of preferences ({there}); expected one of {known}")


def write_preferences(
    path: str | os.PathLike[str], preferences: Iterable[Preference], layout: str = "native"
) -> None:
    """Writes a .jsonl or .parquet file, which appears whole or not at all.

    Args:
      path: its suffix says which.
      preferences: what to write; checked as when they are read.
      layout: of `LAYOUTS`. Those of pairs get a record for each pair of unlike rank, "unpaired" one
        for each label, "demonstrations" one for each good response.
    Raises:
      UserError: if a preference is wrong, or the layout or kind of file cannot hold it.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown; expected one of {', '.join(LAYOUTS)}")
    records = []
    for number, preference in enumerate(preferences):
        try:
            check(preference)
            records += LAYOUTS[layout].write(preference)
        except UserError as error:
            raise UserError(f"{path}: preference {number + 1}: layout {layout}: {error}") from error
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".jsonl":
        # Half of a surrogate pair, which a model may write, is no UTF-8; escaped, it is JSON.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    elif path.suffix == ".parquet":
        _write_parquet(temporary, records, path)
    else:
        raise UserError(f"{path}: expected a name that ends in .jsonl or .parquet")
    temporary.replace(path)


def _write_parquet(temporary: Path, records: list[Record], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for record in records for name in record)
    try:
        table = pa.table({name: [record.get(name) for record in records] for name in names})
        pq.write_table(table, temporary)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise UserError(
            f"{path}: a column of a Parquet file holds values of one type: {error}; write .jsonl"
        ) from error


def from_ultrafeedback(record: Record, *, score: str = "overall_score") -> Preference:
    """instruction, and completions: a list of {"response": text, score: number}.

    Args:
      score: key of the number; the other keys of a completion are kept in fields["completions"].
    """
    instruction, completions = taken(record, "instruction", "completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise UserError(f"completions: expected a list of objects, came {kind(completions)}")
    responses, scores, rest = [], [], []
    for i, completion in enumerate(completions):
        if missing := [key for key in ("response", score) if key not in completion]:
            there = ", ".join(completion) or "none"
            raise UserError(f"completions[{i}]: no {' and no '.join(missing)} (keys: {there})")
        responses.append(completion["response"])
        scores.append(completion[score])
        rest.append({k: v for k, v in completion.items() if k not in ("response", score)})
    used = ("instruction", "completions")
    made_of = {key: value for key, value in record.items() if key not in used}
    if any(rest):
        made_of["completions"] = rest
    return made(made_of, (), prompt=instruction, responses=responses, scores=scores)


def to_ultrafeedback(preference: Preference, *, score: str = "overall_score") -> list[Record]:
    """The record that `from_ultrafeedback` reads, of a preference by scores on a text."""
    if preference.scores is None or not isinstance(preference.prompt, str):
        raise UserError("this layout holds scores of responses to a text and nothing else")
    others = noted(preference)
    rest = others.pop("completions", [{}] * len(preference.responses))
    completions = [
        {"response": response, score: value} | more
        for response, value, more in zip(preference.responses, preference.scores, rest, strict=True)
    ]
    return [{"instruction": preference.prompt, "completions": completions} | others]


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: all(record.get(name) is not None for name in names)


def _is_bare_pair(record: Record) -> bool:
    return _has("chosen", "rejected")(record) and not _has("prompt")(record)


def _never(record: Record) -> bool:
    return False


LAYOUTS: dict[str, Layout] = {
    "native": Layout(
        "prompt, responses and one of ranks, choices, labels, scores",
        _has("responses"), from_native, lambda preference: [to_native(preference)],
    ),
    "pairs": Layout(
        "prompt, chosen, rejected", _has("prompt", "chosen", "rejected"), from_pairs, to_pairs
    ),
    "implicit": Layout(
        "chosen, rejected, which both begin with the prompt",
        lambda r: _is_bare_pair(r) and not is_transcript(r),
        from_implicit, to_implicit,
    ),
    "unpaired": Layout(
        "prompt, completion, label", _has("prompt", "completion", "label"), from_unpaired,
        to_unpaired,
    ),
    "demonstrations": Layout(
        "prompt, completion, all of them good",
        # One whose label is null is no demonstration: the labels of the others would not be read.
        lambda r: _has("prompt", "completion")(r) and "label" not in r,
        from_demonstration, to_demonstration,
    ),
    "hh": Layout(
        f"chosen, rejected, transcripts from {HUMAN!r} on",
        lambda r: _is_bare_pair(r) and is_transcript(r), from_hh, to_hh,
    ),
    "hh_text": Layout(
        "the same, read as text", _never, functools.partial(from_hh, as_text=True), to_hh
    ),
    "ultrafeedback": Layout(
        "instruction, completions of response and overall_score",
        _has("instruction", "completions"), from_ultrafeedback, to_ultrafeedback,
    ),
    "ultrafeedback_fine": Layout(
        "the same with fine-grained_score", _never,
        functools.partial(from_ultrafeedback, score="fine-grained_score"),
        functools.partial(to_ultrafeedback, score="fine-grained_score"),
    ),
}  # fmt: skip
"""Name -> layout. Those that fit no record by themselves have to be named."""
