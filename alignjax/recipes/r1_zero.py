"""The finished stages of the R1-Zero recipe -> its story in words and in one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.report import Curve, Transcript, reasoning_picture
from alignjax.train.metrics import read_metrics

INTRODUCTION = """\
A base model of 0.4M parameters is pretrained from nothing on sums such as 12*03-09= (27), most of
them answered with a guess, and on drills, marked as such, that work sums out. Then reinforcement
learning rewards right answers to sums, and nothing else but their format. Watch the accuracy on
held-out problems and the length of the answers: it learns to write its working down. On this scale
RL elicits and sharpens what the base model shows rarely; it does not discover arithmetic. The
control is trained in the same way, but may not think.
Under 6 minutes on 2 cores; Ctrl-C saves, and the same command continues.
"""


def tell(recipe_dir: Path) -> str:
    """What base, `zero` and `control` came to, and one problem before and after.

    Sampled accuracy is the mean over the samples of each problem, as the paper has it, and maj@n
    the accuracy of the answer that most of them give.
    """
    zero, control = (evaluations(recipe_dir / name) for name in ("zero", "control"))
    found = {name: final(recipe_dir, name) for name in ("base", "zero", "control")}
    n = found["zero"]["num_samples"]
    majority = f"maj@{n}" if n > 1 else "pass@1"
    heads = ("pass@1", majority, "greedy", "length", "reflect")
    lines = ["", f"{'held-out problems':<22}" + "".join(f"{head:>9}" for head in heads)]
    for title, name, row in (
        ("base model", "base", zero[0]),
        ("after RL", "zero", zero[-1]),
        ("after RL, no thinking", "control", control[-1]),
    ):
        figures = found[name]
        lines.append(
            f"{title:<22}{figures['pass@1']['mean']:>9.1%}{figures[majority]['mean']:>9.1%}"
            f"{row['eval/greedy/accuracy']:>9.1%}{figures['mean_length']:>9.1f}"
            f"{figures['parts']['reflects']['mean']:>9.1%}"
        )
    num = found["zero"]["num_problems"]
    lines.append(
        f"pass@1 is the mean of {n} samples of each of {num} problems; reflect the share of"
    )
    lines.append('them that look back at themselves, by a word such as "wait"')
    for moment in _story(recipe_dir / "zero"):
        lines.append(f"{moment.title:<10} {moment.prompt}{moment.completion}")
    return "\n".join(lines) + "\n"


def final(recipe_dir: Path, name: str) -> dict[str, Any]:
    """The figures of the stage NAME_eval."""
    return json.loads((recipe_dir / f"{name}_eval" / "eval.json").read_text(encoding="utf-8"))


def draw(recipe_dir: Path, path: Path) -> None:
    """The picture: accuracy beside length over RL steps, the control, and three transcripts."""
    zero, control = (evaluations(recipe_dir / name) for name in ("zero", "control"))
    reasoning_picture(
        path,
        _curve(zero),
        _curve(control),
        _story(recipe_dir / "zero"),
        title="A base model learns to reason from nothing but a rule-based reward",
        subtitle="GRPO on arithmetic chains, 0.4M parameters, 2 CPU cores. RL elicits and sharpens "
        "what the base model shows rarely; it does not discover arithmetic.",
    )


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with an evaluation."""
    return [row for row in read_metrics(run_dir) if "eval/sampled/accuracy" in row]


def _curve(rows: Sequence[Mapping[str, Any]]) -> Curve:
    return Curve(
        steps=[row["step"] for row in rows],
        sampled=[row["eval/sampled/accuracy"] for row in rows],
        greedy=[row["eval/greedy/accuracy"] for row in rows],
        lengths=[row["eval/sampled/mean_length"] for row in rows],
        reflects=[row["eval/sampled/reflects"] for row in rows],
    )


def _story(run_dir: Path) -> list[Transcript]:
    """One held-out problem at the start, in the middle and at the end of the run.

    It is the first one shown that the final model solves, to show what a right answer looks like;
    how often there is one is for the curves to tell.
    """
    with (run_dir / "samples.jsonl").open(encoding="utf-8") as file:
        shown = [s for s in map(json.loads, file) if s.get("split") == "eval/sampled"]
    steps = sorted({sample["step"] for sample in shown})
    by_step = {step: [s for s in shown if s["step"] == step] for step in steps}
    solved = [i for i, s in enumerate(by_step[steps[-1]]) if s["parts"].get("accuracy") == 1]
    index = solved[0] if solved else 0
    moments = {"start": steps[0], "middle": steps[len(steps) // 2], "end": steps[-1]}
    return [
        Transcript(
            title=f"step {step}",
            prompt=by_step[step][index]["prompt"],
            completion=by_step[step][index]["completion"],
            is_correct=by_step[step][index]["parts"].get("accuracy") == 1,
        )
        for step in moments.values()
    ]
