"""RLAIF where the truth is known, with several seeds -> tables and a JSON file.

    python benchmarks/rlaif.py --seeds 0 1 2

Runs configs/recipes/rlaif.yaml and then its controls, configs/recipes/rlaif_controls.yaml, for each
seed, with a world and a base model of its own; then samples from every model what nobody was asked
in training, and measures the hidden reward and the KL from the base model. Runs go to runs/; what
is finished is not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import manners
import numpy as np
from record import REPO, RESULTS, write
from seeded import minutes, run
from table import table

from alignjax.cli.runtime import prepare

POLICIES = ("rl", "direct", "online_dpo")
CONTROLS = ("true_rl", "noisy_rl")
REWARD_MODELS = ("reward", "true_reward", "noisy_reward")
LABELS = ("labels", "noisy_labels", "one_order_labels")


def labels(stage: Path) -> dict[str, float]:
    """How far the judge's ranks are those of the hidden reward, and what places did to it."""
    found = json.loads((stage / "label.json").read_text(encoding="utf-8"))
    truth = found["agreement"]["no annotator"]
    figures = {key: truth[key] for key in ("same_order", "low", "high", "num_pairs")}
    names = ("first_is_preferred", "orders_agree")  # Of both orders alone.
    return figures | {name: found[name] for name in names if name in found}


def measure(seed: int) -> dict[str, Any]:
    folder = run("rlaif", seed)
    controls = run("rlaif_controls", seed, f"vars.rlaif={folder.relative_to(REPO)}")
    stages = {name: (folder if (folder / name).exists() else controls) / name
              for name in (*POLICIES, *CONTROLS, *REWARD_MODELS, *LABELS)}  # fmt: skip
    found: dict[str, Any] = {"seed": seed, "minutes": minutes(folder)}
    found["controls_minutes"] = minutes(controls)
    found["labels"] = {name: labels(stages[name]) for name in LABELS}
    found["reward_models"] = {
        name: manners.held_out_accuracy(stages[name]) for name in REWARD_MODELS
    }
    prompts, base = folder / "world/test.jsonl", folder / "base/model"
    found["models"] = {"base": manners.summary(manners.sampled(base, prompts), np.zeros(1))}
    for name in (*POLICIES, *CONTROLS):
        path = stages[name] / "model"
        rollouts = manners.sampled(path, prompts)
        found["models"][name] = manners.summary(rollouts, manners.kl(rollouts, path, base))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    prepare()
    results = [measure(seed) for seed in args.seeds]
    num = {"num_prompts": 292, "num_samples": manners.NUM_SAMPLES}
    write(RESULTS / "rlaif.json", {**num, "seeds": results})
    names = ("base", *POLICIES, *CONTROLS)
    print(table({name: [r["models"][name] for r in results] for name in names}, manners.COLUMNS))
    for kind, figure in (("reward_models", "accuracy"), ("labels", "same_order")):
        rows = {name: [r[kind][name] for r in results] for name in results[0][kind]}
        print(table(rows, {figure: ".1%"}, title=kind))


if __name__ == "__main__":
    main()
