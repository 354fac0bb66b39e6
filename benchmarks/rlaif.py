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

import numpy as np
from manners import (
    COLUMNS,
    NUM_SAMPLES,
    PARTS,
    held_out_accuracy,
    kl,
    sampled,
    summary,
)
from record import REPO, RESULTS, write
from seeded import minutes, run
from table import table

from alignjax.cli.runtime import prepare
from alignjax.core.types import Sample
from alignjax.phases.scoring import Rewards
from alignjax.recipes import manners
from alignjax.rewards.combine import RewardConfig
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer

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


def weights(reward_model: Path, answers: Path) -> dict[str, float]:
    """What a reward model makes of each part of the hidden reward: the coefficients of a linear fit
    of its scores, as multiples of that of `polite`. In truth each part counts as much, 1."""
    tokenizer = load_tokenizer(reward_model)
    samples = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        prompt = np.array([tokenizer.bos_id, *tokenizer.encode(record["prompt"])], np.int32)
        for text in record["responses"]:
            ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
            samples.append(Sample(record["prompt"], text, prompt_ids=prompt, completion_ids=ids))
    with Rewards(
        RewardConfig(models={"learned": {"path": str(reward_model)}}),
        tokenizer,
        make_mesh(MeshConfig()),
    ) as rewards:
        scores = [score.value for score in rewards(samples)]
    parts = [manners.score(sample.prompt, sample.completion) for sample in samples]
    rows = [[*(found[part] for part in PARTS), 1.0] for found in parts]
    fit, *_ = np.linalg.lstsq(np.array(rows), np.array(scores), rcond=None)
    return {part: float(value / fit[0]) for part, value in zip(PARTS, fit, strict=False)}


def measure(seed: int) -> dict[str, Any]:
    folder = run("rlaif", seed)
    controls = run("rlaif_controls", seed, f"vars.rlaif={folder.relative_to(REPO)}")
    stages = {name: (folder if (folder / name).exists() else controls) / name
              for name in (*POLICIES, *CONTROLS, *REWARD_MODELS, *LABELS)}  # fmt: skip
    found: dict[str, Any] = {"seed": seed, "minutes": minutes(folder)}
    found["controls_minutes"] = minutes(controls)
    found["labels"] = {name: labels(stages[name]) for name in LABELS}
    found["reward_models"] = {
        name: held_out_accuracy(stages[name])
        | weights(stages[name] / "model", folder / "held_out/preferences.jsonl")
        for name in REWARD_MODELS
    }
    prompts, base = folder / "world/test.jsonl", folder / "base/model"
    found["models"] = {"base": summary(sampled(base, prompts), np.zeros(1))}
    for name in (*POLICIES, *CONTROLS):
        path = stages[name] / "model"
        rollouts = sampled(path, prompts)
        found["models"][name] = summary(rollouts, kl(rollouts, path, base))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    prepare()
    results = [measure(seed) for seed in args.seeds]
    num = {"num_prompts": 292, "num_samples": NUM_SAMPLES}
    write(RESULTS / "rlaif.json", {**num, "seeds": results})
    names = ("base", *POLICIES, *CONTROLS)
    print(table({name: [r["models"][name] for r in results] for name in names}, COLUMNS))
    shown = {
        "reward_models": {"accuracy": ".1%", **dict.fromkeys(PARTS, ".2f")},
        "labels": {"same_order": ".1%"},
    }
    for kind, columns in shown.items():
        rows = {name: [r[kind][name] for r in results] for name in results[0][kind]}
        print(table(rows, columns, title=kind))


if __name__ == "__main__":
    main()
