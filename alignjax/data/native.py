"""The native record of preferences <-> `Preference`.

{"prompt": text or messages, "responses": [text, ...], and one of
 "ranks": [1, 2, 2], "choices": [[0, 1], [2, 1]], "labels": [true, null], "scores": [4.5, 3.0],
 and where known "annotator", "time", "comment", and any other key}
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data.preferences import JUDGEMENTS, OPTIONAL, Preference
from alignjax.data.sources import Record


def from_native(record: Record) -> Preference:
    """The native record. A key whose value is null is as one that is not there."""
    present = {key: value for key, value in record.items() if value is not None}
    if missing := [key for key in ("prompt", "responses") if key not in present]:
        raise UserError(
            f"no {' and no '.join(missing)} (fields there: {', '.join(record) or 'none'}); a "
            f'record of preferences has "prompt", "responses" and one of {", ".join(JUDGEMENTS)}'
        )
    names = ("prompt", "responses", *JUDGEMENTS)
    return made(present, (), **{name: present[name] for name in names if name in present})


def made(record: Record, used: Collection[str], **parts: Any) -> Preference:
    """A preference of `parts`, with what else stands in the record besides the keys `used`.

    A key that means something in the native record, but not in this one, is left out. Messages lose
    the keys that are null: a Parquet file has every key in every message.
    """
    if isinstance(prompt := parts["prompt"], list):
        parts["prompt"] = [
            {key: value for key, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in prompt
        ]
    own = {"prompt", "responses", *JUDGEMENTS, *OPTIONAL, *used}
    rest = {k: v for k, v in record.items() if k not in own and v is not None}
    noted = {key: record[key] for key in OPTIONAL if record.get(key) is not None}
    return Preference(**parts, **noted, fields=rest)


def to_native(preference: Preference) -> Record:
    """The record that `from_native` reads."""
    record = dataclasses.asdict(preference)
    fields = record.pop("fields")
    return {k: v for k, v in record.items() if v is not None} | fields


def taken(record: Record, *names: str) -> list[Any]:
    """The values of keys. Raises UserError if one is not there, or null."""
    if missing := [name for name in names if record.get(name) is None]:
        there = ", ".join(record) or "none"
        raise UserError(f"no {' and no '.join(missing)} (fields there: {there})")
    return [record[name] for name in names]


def noted(preference: Preference) -> Record:
    """What a record holds besides prompt, responses and judgement."""
    native = to_native(preference)
    keys = ("annotator", "time", "comment", *preference.fields)
    return {key: native[key] for key in keys if key in native}


def common_length(a: str, b: str) -> int:
    """Characters that two texts have in common at the start."""
    pairs = zip(a, b, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
