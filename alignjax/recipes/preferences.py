"""Preferences in any layout -> files for the stages of RLHF: for training, and held out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data import Preference, open_preferences, write_preferences
from alignjax.data.comparisons import labelled
from alignjax.recipes.chance import Chance


def split(
    out_dir: str | Path,
    *,
    seed: int,
    source: str | list[str],
    num_test: int,
    layout: str = "auto",
    num_train: int | None = None,
) -> None:
    """Writes train.jsonl and test.jsonl, records of preferences, and demonstrations for SFT.

    The latter, train_sft.jsonl and test_sft.jsonl, hold {"prompt", "completion"}, or {"messages"}
    where the prompt is a conversation: the best response to each prompt. All that have one prompt
    are on one side. Records that are wrong, such as those with two equal responses, are left out.

    Args:
      out_dir: created if need be; the files are overwritten.
      seed: of the split.
      source: see `data.open_source`.
      num_test: records that are held out, at least; more if the last of them share a prompt.
      layout: of `data.LAYOUTS`; "auto" goes by the keys of the first record.
      num_train: the first so many of the others; None: all.
    Raises:
      UserError: if nothing would be left to train on.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    found = open_preferences(source, layout, faulty="drop")
    by_prompt: dict[str, list[Preference]] = {}
    for i in range(len(found)):
        by_prompt.setdefault(json.dumps(found[i].prompt), []).append(found[i])
    test: list[Preference] = []
    train: list[Preference] = []
    for group in Chance(f"{seed}/split").shuffled(list(by_prompt.values())):
        (test if len(test) < num_test else train).extend(group)
    if not train:
        raise UserError(
            f"num_test={num_test} leaves nothing to train on: there are {len(found)} records"
        )
    for name, preferences in (("train", train[:num_train]), ("test", test)):
        write_preferences(out_dir / f"{name}.jsonl", preferences)
        _write(out_dir / f"{name}_sft.jsonl", filter(None, map(_demonstration, preferences)))


def _demonstration(preference: Preference) -> dict[str, Any] | None:
    """The first of the best responses as an example for SFT; None if none is said to be good."""
    best = next((response for response, is_good in labelled(preference) if is_good), None)
    if best is None:
        return None
    if isinstance(preference.prompt, str):
        return {"prompt": preference.prompt, "completion": best}
    return {"messages": [*preference.prompt, {"role": "assistant", "content": best}]}


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
