"""Figures of configs/recipes/gsm8k_laptop.yaml: loss, reward, accuracy before and after, and time.

Runs the recipe (finished stages are kept, with the time they took), samples every held-out problem
from the model before and after GRPO with the same seed, and compares problem by problem.

    python benchmarks/gsm8k_laptop.py
    python benchmarks/gsm8k_laptop.py vars.train=train.jsonl vars.test=test.jsonl --num-samples 4

Seconds of CPU are those of all processes and threads; on a machine with other work they say more
than the clock does.
"""

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record

from alignjax.cli.runtime import prepare
from alignjax.core.config import build, find_config, load
from alignjax.evals.accuracy import Z95, Estimate, paired_difference
from alignjax.evals.run import EvalConfig, Report, evaluate
from alignjax.models import load as load_model
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.phases.scoring import Rewards
from alignjax.recipes.graph import RecipeConfig, run_recipe
from alignjax.train.metrics import read_metrics


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run_timed(config: RecipeConfig, name: str, folder: Path) -> dict[str, Any]:
    """Runs a stage; one that is finished keeps the time of the process that finished it."""
    path = folder / f"{name}.time.json"
    start, start_cpu, steps = time.perf_counter(), cpu_seconds(), _steps_done(folder / name)
    run_recipe(config.model_copy(update={"stages": {name: config.stages[name]}}), command="again")
    if not path.exists():
        figures = {
            "wall_s": round(time.perf_counter() - start, 1),
            "cpu_s": round(cpu_seconds() - start_cpu, 1),
            "load_average": round(os.getloadavg()[1], 1),
        }
        if steps:
            figures["resumed_from_step"] = steps  # The time before that is not counted.
        path.write_text(json.dumps(figures), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def _steps_done(run_dir: Path) -> int:
    return read_metrics(run_dir)[-1]["step"] if (run_dir / "metrics.jsonl").exists() else 0


def sample(stage: GrpoConfig, model: str, num_samples: int) -> Report:
    """Every held-out problem whose prompt is not too long, with the settings of the rollouts."""
    assert stage.data.eval is not None
    return evaluate(
        EvalConfig(
            model=model,
            data=stage.data.eval,
            text=stage.data.text,
            rewards=stage.rewards,
            answer="hashes",
            overlong="drop",
            num_samples=num_samples,
            temperature=stage.rollout.temperature,
            max_prompt_tokens=stage.rollout.max_prompt_tokens,
            max_tokens=stage.rollout.max_tokens,
            max_rows=256,
        ),
        Rewards,
    )


def compared(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Means, and after - before with its 95% interval, m +- 1.96 s / sqrt(P).

    Args:
      before, after: [P, n] float; the samples of each problem. The problem is the unit.
    """
    d = after.mean(axis=1, dtype=np.float64) - before.mean(axis=1, dtype=np.float64)
    mean, half = float(d.mean()), float(Z95 * d.std(ddof=1) / np.sqrt(len(d)))
    return {
        "before": float(before.mean(dtype=np.float64)),
        "after": float(after.mean(dtype=np.float64)),
        "difference": {"mean": mean, "low": mean - half, "high": mean + half},
    }


def interval(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--num-samples", type=int, default=2, help="of each held-out problem")
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "gsm8k_laptop.json")
    args = parser.parse_args()
    prepare()
    config = build(RecipeConfig, load(find_config("recipes/gsm8k_laptop"), args.overrides))
    folder = Path(config.output_dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    times = {name: run_timed(config, name, folder) for name in config.stages}
    total = {unit: round(sum(t[unit] for t in times.values()), 1) for unit in ("wall_s", "cpu_s")}

    losses = [row["eval/loss"] for row in read_metrics(folder / "sft") if "eval/loss" in row]
    _, params = load_model(folder / "sft" / "model")
    stage = config.stages["grpo"]
    assert isinstance(stage, GrpoConfig)
    before, after = (
        sample(stage, str(folder / name / "model"), args.num_samples) for name in ("sft", "grpo")
    )
    if failed := before.num_failed + after.num_failed:
        raise SystemExit(f"{failed} rewards failed: look at the samples before comparing")
    reward = compared(before.rollouts.rewards, after.rollouts.rewards)
    parts = {
        name: compared(before.rollouts.part(name), after.rollouts.part(name))
        for name in before.rollouts.part_names
    }
    right = [r.rollouts.part("accuracy") >= 0.5 for r in (before, after)]
    accuracy = {
        "before": interval(before.estimates["pass@1"]),
        "after": interval(after.estimates["pass@1"]),
        "difference": interval(paired_difference(*right)),
    }
    record.write(
        args.out,
        {
            "note": args.note,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "units": {
                "loss": "nats per token of the answers, all held-out problems that fit a row",
                "difference": "after - before, paired by problem, 95% interval",
            },
            "time": {**times, "total": total},
            "figures": {
                "eval_loss": {"before": losses[0], "after": losses[-1]},
                "problems": len(before.rollouts.tasks),
                "samples_of_each": args.num_samples,
                "reward": reward,
                "parts": parts,
                "accuracy": accuracy,
                "mean_length": {"before": before.mean_length, "after": after.mean_length},
                "truncated": {"before": before.truncated_frac, "after": after.truncated_frac},
            },
        },
    )
    print(json.dumps({"reward": reward, "accuracy": accuracy}, indent=2))


if __name__ == "__main__":
    main()
