"""The finished stages of the R1 recipe -> one page: what each changed, and how they answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError
from alignjax.recipes.r1_zero import evaluations
from alignjax.report import Transcript, stages_picture

STAGES = {
    "base": ("zero", 0), "Zero": ("zero", -1), "Dev1": ("dev2", 0), "Dev2": ("dev2", -1),
    "Dev3": ("r1", 0), "R1": ("r1", -1),
}  # fmt: skip
"""Whose evaluation, and which of them, says what a stage is like: RL begins with one."""
PANELS = {
    "Sums solved": "accuracy", "Sums in mixed notation": "language/mixes",
    "Requests done well": "general", "Unsafe answers": "general/unsafe",
}  # fmt: skip
SHOWN = ("Zero", "Dev2", "R1")


def write(out_dir: str | Path, *, seed: int, zero: str, dev2: str, r1: str) -> None:
    """Writes r1.png, and stages.json with what it shows.

    Args:
      out_dir: created if need be.
      seed: nothing is drawn by chance.
      zero, dev2, r1: directories of the runs, which evaluate on the same prompts and show some of
        both kinds (evaluation.num_shown).
    Raises:
      UserError: if a run has no evaluation, or shows no sum or no request.
    """
    del seed
    folder, runs = Path(out_dir), {"zero": Path(zero), "dev2": Path(dev2), "r1": Path(r1)}
    folder.mkdir(parents=True, exist_ok=True)
    found = {stage: _evaluation(runs[run], index) for stage, (run, index) in STAGES.items()}
    shares = {
        title: {stage: row[f"eval/sampled/{name}"] for stage, row in found.items()}
        for title, name in PANELS.items()
    }
    (folder / "stages.json").write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")
    stages_picture(
        folder / "r1.png",
        shares,
        [_row(runs, "accuracy", "language"), _row(runs, "general", "general")],
        title="The whole line of DeepSeek-R1, in a world with known truth",
        subtitle="0.4M parameters, 2 CPU cores. Validation prompts, one sample of each at "
        "temperature 1. That mixing the notations pays is planted in the corpus.",
    )


def _evaluation(run: Path, index: int) -> Mapping[str, Any]:
    rows = evaluations(run)
    if not rows:
        raise UserError(f"{run}: no evaluation in metrics.jsonl; set data.eval")
    return rows[index]


def _row(runs: Mapping[str, Path], part: str, gained: str) -> Sequence[Transcript]:
    """How the stages answer one prompt of a kind: of those shown that R1 answers rightly the one
    that has gained most since Zero, so that there is something to see; how often that is so is for
    the bars to tell.

    Args:
      part: the part of the reward that says what is right, which prompts of this kind have.
      gained: the part whose gain is looked at.
    """
    shown = {}
    for stage in SHOWN:
        run, index = STAGES[stage]
        shown[stage] = _samples(runs[run], index, part)
    prompts = list(shown[SHOWN[0]])
    if not prompts:
        raise UserError(
            f"{runs[run]}: no sample with the reward {part!r} is shown; raise evaluation.num_shown"
        )

    def gain(prompt: str) -> tuple[float, float]:
        first, last = shown["Zero"][prompt], shown["R1"][prompt]
        return _value(last, part), _value(last, gained) - _value(first, gained)

    chosen = max(prompts, key=gain)
    return [
        Transcript(
            title=stage,
            prompt=chosen,
            completion=samples[chosen]["completion"],
            is_correct=_value(samples[chosen], part) == 1,
        )
        for stage, samples in shown.items()
    ]


def _value(sample: Mapping[str, Any], part: str) -> float:
    return float(sample["parts"].get(part, 0.0))


def _samples(run: Path, index: int, part: str) -> dict[str, Mapping[str, Any]]:
    """The samples shown of one evaluation that have a part of the reward, by their prompts."""
    with (run / "samples.jsonl").open(encoding="utf-8") as file:
        shown = [s for s in map(json.loads, file) if s.get("split") == "eval/sampled"]
    step = sorted({sample["step"] for sample in shown})[index] if shown else None
    return {s["prompt"]: s for s in shown if s["step"] == step and part in s["parts"]}
