"""What people, and simple rules, do between the stages of the R1 recipe: records -> records.

`cold_start` makes the readable chains that R1 begins with; `compare` plays those who say which of
two answers they prefer, of the world of two notations (`notations`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data import open_source
from alignjax.recipes import notations
from alignjax.recipes.chance import Chance

UTILITIES = {"helpful": notations.helpful, "safe": notations.safe}
"""What a person may look at."""


def cold_start(
    out_dir: str | Path, *, seed: int, source: str, num_examples: int = 200,
    rewrite_frac: float = 0.6,
) -> None:  # fmt: skip
    """Writes train.jsonl, {"prompt", "completion"}: right answers, part of them made readable.

    Of each prompt of `source` the first completion. A part of the thoughts is rewritten to X, as
    people have done it for DeepSeek-R1; the others stay as they were sampled, for people miss
    things, and a cold start without a flaw would leave nothing for RL to mend.

    Args:
      out_dir: created if need be; the file is overwritten.
      seed: of which examples are taken, and which are rewritten.
      source: records {"prompt", "completion"} with right answers, such as `phase: reject` writes.
      num_examples: how many.
      rewrite_frac: the chance that one is rewritten.
    Raises:
      UserError: if the source has fewer prompts.
    """
    records = open_source(source)
    first: dict[str, str] = {}
    for i in range(len(records)):
        first.setdefault(records[i]["prompt"], records[i]["completion"])
    if len(first) < num_examples:
        raise UserError(
            f"{source}: {len(first)} prompts have a right answer, not num_examples={num_examples}; "
            "ask for fewer, or sample more of them"
        )
    draw = Chance(f"{seed}/cold_start")
    chosen = draw.shuffled(list(first.items()))[:num_examples]
    _write(
        Path(out_dir) / "train.jsonl",
        (
            {"prompt": p, "completion": notations.to_x(c) if draw.chance(rewrite_frac) else c}
            for p, c in chosen
        ),
    )


def compare(
    out_dir: str | Path, *, seed: int, source: str | list[str], utility: str, noise: float = 0.1,
    min_gap: float = 0.3, max_pairs: int = 2, held_out_frac: float = 0.1,
) -> None:  # fmt: skip
    """Writes train.jsonl and test.jsonl, {"prompt", "responses": two, "ranks"}, in preference form.

    A pair is shown only if its answers are clearly of unlike worth. The person at times takes the
    worse one for the better; of the held-out prompts never, so that a reward model is measured
    against the truth.

    Args:
      out_dir: created if need be; the files are overwritten.
      seed: of the split, of the pairs and of the mistakes.
      source: records {"prompt", "responses"} of general prompts, such as `phase: sample` writes;
        all of one prompt are on one side.
      utility: what is looked at, of `UTILITIES`.
      noise: the chance of a mistake.
      min_gap: the difference in worth that a pair has at least, more than this.
      max_pairs: of a prompt.
      held_out_frac: the chance that a prompt is held out.
    Raises:
      UserError: on another utility, or if nothing can be compared.
    """
    if utility not in UTILITIES:
        raise UserError(f"utility={utility!r}: expected {' or '.join(UTILITIES)}")
    worth, draw = UTILITIES[utility], Chance(f"{seed}/compare/{utility}")
    sides: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    side_of: dict[str, str] = {}
    records = open_source(source)
    for i in range(len(records)):
        prompt, responses = records[i]["prompt"], records[i]["responses"]
        side = side_of.setdefault(prompt, "test" if draw.chance(held_out_frac) else "train")
        found = [(r, worth(prompt, r, None)) for r in responses]
        pairs = [(a, b) for a, b in permutations(found, 2) if a[1] - b[1] > min_gap]
        for (better, _), (worse, _) in draw.shuffled(pairs)[:max_pairs]:
            is_mistaken = side == "train" and draw.chance(noise)
            shown = [better, worse] if draw.chance(0.5) else [worse, better]
            is_first = (shown[0] == better) != is_mistaken
            ranks = [1, 2] if is_first else [2, 1]
            sides[side].append({"prompt": prompt, "responses": shown, "ranks": ranks})
    for side, pairs_of in sides.items():
        if not pairs_of:
            raise UserError(
                f"{source}: no two answers to a prompt of the {side} side differ by more than "
                f"min_gap={min_gap} in {utility}; sample more answers"
            )
        _write(Path(out_dir) / f"{side}.jsonl", pairs_of)


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
