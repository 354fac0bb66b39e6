"""Rankings in a store -> a file of preference records, as the reward and preference phases read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from alignjax.core.errors import UserError
from alignjax.web.store import Store


def write_rankings(store: Store, path: Path) -> int:
    """Writes one JSON line for each ranking by each person, by task, then annotator.

    A record has prompt, responses, ranks (1 is best, equal is a tie; in the order of the
    responses), annotator, time, where there is one a comment, `flagged: true` if it was, and the
    further keys of the record that was ranked. Skipped tasks are not in it. The file appears whole
    or not at all.

    Returns:
      How many rankings it holds.
    Raises:
      UserError: if the name does not end in .jsonl, the folder is missing, or nothing is ranked.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"--export {path}: expected a name that ends in .jsonl")
    if not path.parent.is_dir():
        raise UserError(f"--export {path}: no such folder: {path.parent}")
    ranked = [found for found in store.judgements() if found.kind == "rank"]
    if not ranked:
        raise UserError(f"--export {path}: nothing is ranked in {store.path} yet")
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for judgement in ranked:
            task = store.task(judgement.task)
            record = {
                "prompt": task.prompt,
                "responses": task.responses,
                "ranks": judgement.ranks,
                "annotator": judgement.annotator,
                "time": judgement.time,
            }
            if judgement.comment:
                record["comment"] = judgement.comment
            if judgement.flagged:
                record["flagged"] = True
            print(json.dumps(record | task.fields, ensure_ascii=False), file=file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return len(ranked)
