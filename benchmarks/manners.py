"""RLHF where the truth is known, with several seeds -> a table, a picture and a JSON file.

    python benchmarks/manners.py --seeds 0 1 2

Runs configs/recipes/manners.yaml for each seed, with a base model, rankings and a reward model of
its own; then samples from every model what nobody was asked in training, and measures the hidden
reward and the KL from the base model. Runs go to runs/; what is finished is not run again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from record import REPO, RESULTS, write
from seeded import minutes, run
from table import cell, table

from alignjax.cli.runtime import prepare
from alignjax.core.types import Sample, Score
from alignjax.data import pack
from alignjax.evals.sampler import Sampler, SamplingConfig
from alignjax.models import load
from alignjax.phases.common import score_tokens
from alignjax.phases.scoring import Rewards
from alignjax.recipes import manners
from alignjax.report import style
from alignjax.rewards.combine import RewardConfig
from alignjax.rewards.rollout import Rollouts, Task
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.metrics import read_metrics

POLICIES = ("ppo", "online_dpo", "dpo", "simpo", "kto", "orpo")
NUM_SAMPLES = 4
PARTS = ("polite", "right", "digits", "short")
COLUMNS = dict.fromkeys(("hidden", "kl", *PARTS), ".2f") | {"length": ".1f"}


def hidden(samples: list[Sample]) -> list[Score]:
    """The hidden reward, as a ScoreFn."""
    parts = [manners.score(sample.prompt, sample.completion) for sample in samples]
    return [Score(sum(p.values()), p) for p in parts]


def sampled(model: Path, prompts: Path) -> Rollouts:
    """Samples of a model at temperature 1, scored by the hidden reward."""
    config = SamplingConfig(
        data=str(prompts), text={"fields": {"prompt": "prompt"}}, num_samples=NUM_SAMPLES,
        max_prompt_tokens=8, max_tokens=40,
    )  # fmt: skip
    sampler = Sampler(str(model), config)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    bos = sampler.tokenizer.bos_id
    tasks = [Task(np.array([bos, *sampler.tokenizer.encode(t)], np.int32)) for t in texts]
    return sampler.sample(tasks, hidden)


def kl(rollouts: Rollouts, policy: Path, base: Path) -> np.ndarray:
    """[N] nats: log-prob of each completion under the policy less that under the base."""
    out, sequences = rollouts.completions, []
    for row in range(len(out.tokens)):
        prompt = rollouts.tasks[row // NUM_SAMPLES].tokens
        tokens = np.concatenate([prompt, out.tokens[row, : out.lengths[row]]]).astype(np.int32)
        sequences.append({"tokens": tokens, "mask": np.arange(len(tokens)) >= len(prompt)})
    batch, _ = pack(sequences, num_rows=len(sequences), row_len=48, packed=False)
    logps = []
    for path in (policy, base):
        model, params = load(path)
        logps.append(np.asarray(score_tokens(model, params, batch, with_entropy=False).logps))
    return (logps[0] - logps[1]).sum(1, where=batch["mask"])


def summary(rollouts: Rollouts, divergence: np.ndarray) -> dict[str, float]:
    by_prompt = rollouts.rewards.mean(1)
    return {
        "hidden": float(by_prompt.mean()),
        "hidden_se": float(by_prompt.std(ddof=1) / len(by_prompt) ** 0.5),
        **{part: float(rollouts.part(part).mean()) for part in PARTS},
        "kl": float(divergence.mean()),
        "length": float(rollouts.completions.lengths.mean()),
    }


def measure(seed: int, overrides: list[str]) -> dict[str, Any]:
    folder = run("manners", seed, *overrides)
    result: dict[str, Any] = {"seed": seed, "minutes": minutes(folder)}
    result["reward_model"] = held_out_accuracy(folder / "reward")
    prompts, base = folder / "world/test.jsonl", folder / "base/model"
    from_base = sampled(base, prompts)
    result["base"] = summary(from_base, np.zeros(1))
    result["best_of_4"] = best_of_n(from_base, base, folder / "reward/model")
    for policy in POLICIES:
        path = folder / policy / "model"
        rollouts = sampled(path, prompts)
        result[policy] = summary(rollouts, kl(rollouts, path, base))
    return result


def held_out_accuracy(reward: Path) -> dict[str, float]:
    """What a finished reward phase found of its model at the end."""
    last = read_metrics(reward)[-1]
    names = ("accuracy", "accuracy_low", "accuracy_high", "calibration_error")
    return {name: last[f"eval/{name}"] for name in names if f"eval/{name}" in last}


def best_of_n(rollouts: Rollouts, base: Path, reward_model: Path) -> dict[str, float]:
    """Of the samples of each prompt the one that the reward model likes best."""
    config = RewardConfig(models={"learned": {"path": str(reward_model)}})
    tokenizer = Sampler(str(base), SamplingConfig(data="", text={"fields": {"prompt": "p"}}))
    with Rewards(config, tokenizer.tokenizer, make_mesh(MeshConfig())) as rewards:
        learned = np.array([score.value for score in rewards(rollouts.samples)])
    best = learned.reshape(-1, NUM_SAMPLES).argmax(1)
    rows = np.arange(len(best)) * NUM_SAMPLES + best
    values = rollouts.rewards.reshape(-1)[rows]
    n = NUM_SAMPLES
    return {
        "hidden": float(values.mean()),
        "hidden_se": float(values.std(ddof=1) / len(values) ** 0.5),
        **{part: float(rollouts.part(part).reshape(-1)[rows].mean()) for part in PARTS},
        "kl": float(np.log(n) - (n - 1) / n),
        "length": float(rollouts.completions.lengths[rows].mean()),
    }


def picture(results: list[dict[str, Any]], path: Path) -> None:
    """The hidden reward against the KL from the base model: a point for each seed."""
    figure = style.figure(6.4, 4.2)
    axes = figure.add_subplot()
    style.tidy(axes, "Hidden reward, points, against KL from the base model, nats")
    shown = ("base", "best_of_4", *POLICIES)
    looks = [(colour, marker) for marker in "os" for colour in style.COLOURS]
    for (colour, marker), name in zip(looks, shown, strict=False):
        points = np.array([[r[name]["kl"], r[name]["hidden"]] for r in results])
        label = name.replace("_", " ")
        axes.plot(*points.T, marker, color=colour, ms=7, label=label, alpha=0.85)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    style.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="key=value, for trying things out")
    args = parser.parse_intermixed_args()
    prepare()
    results = [measure(seed, args.overrides) for seed in args.seeds]
    write(RESULTS / "manners.json", {"num_prompts": 292, "seeds": results})
    picture(results, REPO / "docs" / "img" / "manners.png")
    rows = {name: [r[name] for r in results] for name in ("base", "best_of_4", *POLICIES)}
    print(table(rows, COLUMNS))
    accuracy = [result["reward_model"]["accuracy"] for result in results]
    print(f"reward model, held-out pairs: {cell(accuracy, '.1%')}")


if __name__ == "__main__":
    main()
