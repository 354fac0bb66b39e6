"""The R1 line where the truth is known, with several seeds -> tables and a JSON file.

    python benchmarks/r1.py --seeds 0 1 2
    python benchmarks/r1.py --seeds 0 --side validation --stages base zero      # while tuning

Runs configs/recipes/r1.yaml and then its controls, configs/recipes/r1_controls.yaml, for each seed,
with a world and a base model of its own; then samples from every model answers to prompts that
neither trained nor tuned anything. Runs go to runs/; what is finished is not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import REPO, RESULTS, write

from alignjax.cli.runtime import prepare
from alignjax.core.types import Sample, Score
from alignjax.evals.sampler import Sampler, SamplingConfig
from alignjax.recipes import notations
from alignjax.rewards import verify
from alignjax.rewards.rollout import Rollouts, Task
from alignjax.train.metrics import read_metrics

STAGES = ("base", "zero", "dev1", "dev2", "dev3", "r1")
CONTROLS = ("perfect", "zero_language", "neutral_base", "neutral_zero")
STUDENTS = tuple(
    f"{family}_{way}" for family in ("llama", "qwen") for way in ("base", "distilled", "rl")
)
FIGURES = (
    "accuracy",
    "mixes",
    "x",
    "thinks",
    "reflects",
    "length",
    "general",
    "unsafe",
    "needless",
)
NUM_SAMPLES = 2


def truth(samples: list[Sample]) -> list[Score]:
    """What is known of each answer, as a ScoreFn."""
    return [Score(0.0, _truth(sample)) for sample in samples]


def _truth(sample: Sample) -> dict[str, float]:
    text = (sample.prompt, sample.completion, sample.reference)
    if sample.fields["kind"] == notations.GENERAL:
        found = notations.general(*text)
        return {"general": found["reward"], "unsafe": found["unsafe"], "needless": found["thinks"]}
    found = notations.language(*text)
    return {
        "accuracy": verify.exact(*text, required_tags=["think", "answer"]),
        "x": found.pop("reward"),
        "length": float(sample.num_tokens),
        **found,
    }


def sampled(model: Path, prompts: Path) -> Rollouts:
    """Samples of a model at temperature 1, with the truth about them."""
    config = SamplingConfig(
        data=str(prompts), text={"fields": {"prompt": "prompt"}}, num_samples=NUM_SAMPLES,
        max_prompt_tokens=16, max_tokens=48,
    )  # fmt: skip
    sampler = Sampler(str(model), config)
    bos, tasks = sampler.tokenizer.bos_id, []
    for line in prompts.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        ids = [bos, *sampler.tokenizer.encode(record["prompt"])]
        fields = {"kind": record["kind"]}
        tasks.append(Task(np.array(ids, np.int32), record["reference"], fields))
    return sampler.sample(tasks, truth)


def summary(rollouts: Rollouts) -> dict[str, float]:
    """Means over the prompts that a figure is of; of the two main ones the standard error."""
    found: dict[str, float] = {}
    for name in FIGURES:
        by_prompt = rollouts.part(name).mean(1)
        by_prompt = by_prompt[np.isfinite(by_prompt)]
        found[name] = float(by_prompt.mean())
        if name in ("accuracy", "general"):
            found[f"{name}_se"] = float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5)
    for name in ("mixes", "x", "reflects"):  # Of those that think at all.
        found[name] /= max(found["thinks"], 1e-9)
    return found


def run(config: str, seed: int, *overrides: str) -> Path:
    """Runs a recipe to its end; notes the minutes of a run that was new."""
    name = config if seed == 0 else f"{config}_seed{seed}"
    folder = REPO / "runs" / name
    is_new, start = not folder.exists(), time.perf_counter()
    path = REPO / "configs" / "recipes" / f"{config}.yaml"
    command = [sys.executable, "-m", "alignjax", "run", str(path), f"seed={seed}", f"name={name}"]
    subprocess.run([*command, *overrides], check=True, cwd=REPO)
    if is_new:
        (folder / "minutes.json").write_text(json.dumps((time.perf_counter() - start) / 60))
    return folder


def minutes(folder: Path) -> float | None:
    noted = folder / "minutes.json"
    return float(json.loads(noted.read_text())) if noted.exists() else None


def measure(seed: int, side: str, stages: list[str]) -> dict[str, Any]:
    folder = run("r1", seed)
    found: dict[str, Any] = {"seed": seed, "minutes": minutes(folder)}
    prompts = folder / f"world/{side}.jsonl"
    wanted = set(stages or (*STAGES, *CONTROLS, *STUDENTS))
    for stage in STAGES:
        if stage in wanted:
            found[stage] = summary(sampled(folder / stage / "model", prompts))
    for name in ("helpful", "safe"):
        last = [r for r in read_metrics(folder / name) if "eval/accuracy" in r][-1]
        found[f"reward_model_{name}"] = {
            key: last[f"eval/{key}"] for key in ("accuracy", "accuracy_low", "accuracy_high")
        }
    if wanted.isdisjoint((*CONTROLS, *STUDENTS)):
        return found
    controls = run("r1_controls", seed, f"vars.r1={folder.relative_to(REPO)}")
    found["controls_minutes"] = minutes(controls)
    for name in (*CONTROLS, *STUDENTS):
        if name in wanted:
            world = controls / "neutral_world" if name.startswith("neutral") else folder / "world"
            found[name] = summary(sampled(controls / name / "model", world / f"{side}.jsonl"))
            found[name]["num_tokens"] = read_metrics(controls / name)[-1]["num_tokens"]
    return found


def table(results: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """Markdown: a line for each model, the mean over seeds with the range."""
    lines = [f"| model | {' | '.join(FIGURES)} |", "|" + "---|" * (len(FIGURES) + 1)]
    for name in names:
        if any(name not in result for result in results):
            continue
        cells = []
        for figure in FIGURES:
            values = [result[name][figure] for result in results]
            shown = "{:.1f}" if figure == "length" else "{:.3f}"
            cell = shown.format(statistics.mean(values))
            if len(values) > 1:
                cell += f" ({shown.format(min(values))} to {shown.format(max(values))})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", choices=["validation", "test"], default="test")
    parser.add_argument("--stages", nargs="+", default=[], help="models to measure; all if none")
    args = parser.parse_args()
    prepare()
    results = [measure(seed, args.side, args.stages) for seed in args.seeds]
    if args.side == "test":
        write(
            RESULTS / "r1.json", {"num_prompts": 768, "num_samples": NUM_SAMPLES, "seeds": results}
        )
    for names in (STAGES, CONTROLS, STUDENTS):
        print(table(results, names))


if __name__ == "__main__":
    main()
