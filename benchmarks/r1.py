"""The R1 line where the truth is known, with several seeds -> tables and a JSON file.

    python benchmarks/r1.py --seeds 0 1 2
    python benchmarks/r1.py --seeds 0 --side validation --stages base zero      # while tuning
    python benchmarks/r1.py --finished             # measures what has been run, and runs nothing

Runs configs/recipes/r1.yaml, then its students and its controls, r1_students.yaml and
r1_controls.yaml, for each seed, with a world and a base model of its own; and samples from every
model answers to prompts that neither trained nor tuned anything. Runs go to runs/; what is finished
is not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import REPO, RESULTS, write
from safetensors.numpy import load_file
from table import table

from alignjax.cli.runtime import prepare
from alignjax.core.types import Sample, Score
from alignjax.evals.sampler import Sampler, SamplingConfig
from alignjax.recipes import notations
from alignjax.rewards import verify
from alignjax.rewards.rollout import Rollouts, Task
from alignjax.train.metrics import read_metrics

STAGES = ("base", "zero", "dev1", "dev2", "dev3", "r1")
CONTROLS = ("perfect", "zero_language", "neutral_base", "neutral_zero")
FAMILIES = ("llama", "qwen")
STUDENTS = tuple(
    f"{family}_{way}" for family in FAMILIES for way in ("base", "distilled", "rl", "rl_more")
)
RECIPES = {"r1": STAGES, "r1_students": STUDENTS, "r1_controls": CONTROLS}
FIGURES = {
    "accuracy": ".1%", "mixes": ".1%", "x": ".1%", "thinks": ".1%", "reflects": ".1%",
    "length": ".1f", "general": ".1%", "unsafe": ".1%", "needless": ".1%",
}  # fmt: skip
"""What is measured, and how it is written."""
EFFORT = {"accuracy": ".1%", "completions": ",.0f", "gflop": ",.0f", "gflop_with_teacher": ",.0f"}
NUM_SAMPLES = 2
ITERATION = 32 * 8
"""Completions of a student's step of RL."""


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


def effort(folder: Path, students: Path, teacher: dict[str, float]) -> dict[str, dict[str, float]]:
    """What each student was given after its base model: completions, of the teacher or its own, and
    GFLOP.

    A token costs 2 FLOP for each parameter that multiplies it, 4 more where it is trained on:
    6 in SFT, and 8 in RL, where it is sampled first. Attention over the context is left out, which
    is about alike for both.

    Args:
      teacher: the summary of the model whose samples were kept.
    """
    asked = json.loads((folder / "kept" / "reject.json").read_text())["num_samples"]
    kept = json.loads((folder / "kept" / "kept.jsonl").read_text().splitlines()[0])
    # A prompt's signs are tokens, and all prompts are of one length; BOS comes before.
    sample_len = 1 + len(kept["prompt"]) + teacher["length"]
    sampling = 2 * num_multiplied(folder / "dev2" / "model") * asked * sample_len / 1e9
    num_lines = sum(
        len((folder / path).read_text(encoding="utf-8").splitlines())
        for path in ("kept/kept.jsonl", "world/demonstrations.jsonl")
    )
    found = {}
    for family in FAMILIES:
        size = num_multiplied(students / f"{family}_base" / "model")
        last = {w: read_metrics(students / f"{family}_{w}")[-1] for w in ("distilled", "rl")}
        more = read_metrics(students / f"{family}_rl_more")[-1]
        sft = 6 * size * last["distilled"]["num_tokens"] / 1e9
        found[f"{family}_distilled"] = {
            "completions": last["distilled"]["epoch"] * num_lines,
            "gflop": sft,
            "gflop_with_teacher": sft + sampling,
        }
        steps, tokens = 0, 0
        for way, row in (("rl", last["rl"]), ("rl_more", more)):
            steps, tokens = steps + row["step"], tokens + row["num_tokens"]
            found[f"{family}_{way}"] = {
                "completions": steps * ITERATION,
                "gflop": 8 * size * tokens / 1e9,
                "gflop_with_teacher": 8 * size * tokens / 1e9,
            }
    return found


def num_multiplied(model: Path) -> int:
    """Parameters but for the embedding, of which a token looks up a row."""
    tensors = load_file(model / "model.safetensors")
    return sum(v.size for name, v in tensors.items() if "embed_tokens" not in name)


def directory(config: str, seed: int) -> Path:
    return REPO / "runs" / (config if seed == 0 else f"{config}_seed{seed}")


def run(config: str, seed: int, *overrides: str) -> None:
    """Runs a recipe to its end; notes the minutes of a run that was new."""
    folder = directory(config, seed)
    is_new, start = not folder.exists(), time.perf_counter()
    path = REPO / "configs" / "recipes" / f"{config}.yaml"
    command = [sys.executable, "-m", "alignjax", "run", str(path), f"seed={seed}"]
    subprocess.run([*command, f"name={folder.name}", *overrides], check=True, cwd=REPO)
    if is_new:
        (folder / "minutes.json").write_text(json.dumps((time.perf_counter() - start) / 60))


def minutes(folder: Path) -> float | None:
    noted = folder / "minutes.json"
    return float(json.loads(noted.read_text())) if noted.exists() else None


def measure(seed: int, side: str, wanted: set[str], *, is_finished: bool) -> dict[str, Any]:
    """Figures of the models that are wanted, and of the reward models.

    Args:
      side: of the prompts, validation or test.
      is_finished: run nothing, and leave out what is not there.
    """
    folder = directory("r1", seed)
    found: dict[str, Any] = {"seed": seed}
    for config, names in RECIPES.items():
        if wanted.isdisjoint(names) and config != "r1":
            continue
        own = directory(config, seed)
        if not is_finished:
            run(config, seed, *([] if config == "r1" else [f"vars.r1={folder.relative_to(REPO)}"]))
        found[f"{config}_minutes"] = minutes(own)
        for name in names:
            if name in wanted and (own / name / "model").exists():
                world = own / "neutral_world" if name.startswith("neutral") else folder / "world"
                found[name] = summary(sampled(own / name / "model", world / f"{side}.jsonl"))
    for name in ("helpful", "safe"):
        last = [r for r in read_metrics(folder / name) if "eval/accuracy" in r][-1]
        found[f"reward_model_{name}"] = {
            key: last[f"eval/{key}"] for key in ("accuracy", "accuracy_low", "accuracy_high")
        }
    if found.keys() >= {"dev2", *STUDENTS}:
        for name, figures in effort(folder, directory("r1_students", seed), found["dev2"]).items():
            found[name] |= figures
    return found


def rows(
    results: list[dict[str, Any]], names: tuple[str, ...], figure: str
) -> dict[str, list[dict[str, float]]]:
    """Models that have the figure -> what each seed gave; of how many, where some are missing."""
    found = {name: [r[name] for r in results if figure in r.get(name, {})] for name in names}
    return {
        name if len(of) == len(results) else f"{name}, {len(of)} of {len(results)} seeds": of
        for name, of in found.items()
        if of
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", choices=["validation", "test"], default="test")
    parser.add_argument("--stages", nargs="+", default=[], help="models to measure; all if none")
    parser.add_argument(
        "--finished", action="store_true", help="run nothing, measure what is there"
    )
    args = parser.parse_args()
    prepare()
    wanted = set(args.stages or (name for names in RECIPES.values() for name in names))
    results = [measure(seed, args.side, wanted, is_finished=args.finished) for seed in args.seeds]
    if args.side == "test":
        write(
            RESULTS / "r1.json", {"num_prompts": 768, "num_samples": NUM_SAMPLES, "seeds": results}
        )
    for names, figure, columns in (
        *((names, "accuracy", FIGURES) for names in RECIPES.values()),
        (STUDENTS, "gflop", EFFORT),
    ):
        if found := rows(results, names, figure):
            print(table(found, columns))


if __name__ == "__main__":
    main()
