"""Constitutional AI where the truth is known, with several seeds -> tables and a JSON file.

    python benchmarks/constitutional.py --seeds 0 1 2

Runs configs/recipes/constitutional.yaml for each seed, and variants of it from the same base model:
a principle left out of the constitution; labels by the checker itself, the same with 20% of them
turned round, and labels of the base in one order only. Then samples answers to held-out prompts
from every model, and has the checker count the principles that they break. Runs go to runs/; what
is finished is not run again.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import REPO, RESULTS, write

from alignjax.cli.runtime import prepare
from alignjax.core.config import build, dump, load, loads
from alignjax.core.types import Sample, Score
from alignjax.data import pack
from alignjax.evals.sampler import Sampler, SamplingConfig
from alignjax.models import load as load_model
from alignjax.phases.common import score_tokens
from alignjax.phases.judges import open_judge
from alignjax.recipes import principles
from alignjax.recipes.graph import RecipeConfig, run_recipe
from alignjax.rewards.judge import Pair
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.rewards.rollout import Rollouts, Task
from alignjax.sharding import MeshConfig, make_mesh

RECIPE = REPO / "configs" / "recipes" / "constitutional.yaml"
COMMAND = "python benchmarks/constitutional.py"
NUM_SAMPLES = 4
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    f"without_{name}": {
        "revisions": {"constitution.leave_out": [name], "num_rounds": 3},
        "labels": {"constitution.leave_out": [name]},
    }
    for name in principles.PRINCIPLES
}
TRUE_JUDGE = "alignjax.recipes.principles.true_judge"
CHANGES |= {
    "true_labels": {"labels": {"judge": {"name": "truth", "function": TRUE_JUDGE}}},
    "noisy_labels": {
        "labels": {"judge": {"name": "noisy", "function": TRUE_JUDGE, "args": {"noise": 0.2}}}
    },
    "one_order": {"labels": {"judge.both_orders": False}},
}
"""Variant -> stage -> key -> value. A stage that is changed, and those that read it, are run anew
under a name of their own, beside the others of the recipe."""


def recipe_of(seed: int, overrides: Sequence[str], variant: str = "") -> RecipeConfig:
    """The recipe, or a variant of it in the same directory, up to rl_cai."""
    name = "constitutional" if seed == 0 else f"constitutional_seed{seed}"
    values = load(RECIPE, [*overrides, f"name={name}", f"seed={seed}"]).values
    if not variant:
        return build(RecipeConfig, loads(dump(values)))
    changes, stages, renamed = CHANGES[variant], {}, {}
    for stage, config in values["stages"].items():
        is_new = stage in changes or any(f"${{{old}}}" in json.dumps(config) for old in renamed)
        if is_new and stage != "dpo":
            renamed[stage] = f"{stage}_{variant}"
            text = json.dumps(config)
            for old, new in renamed.items():
                text = text.replace(f"${{{old}}}", f"${{{new}}}")
            config = json.loads(text)
            for key, value in changes.get(stage, {}).items():
                *way, last = key.split(".")
                here = config
                for part in way:
                    here = here[part]
                here[last] = value
        if stage != "dpo":
            stages[renamed.get(stage, stage)] = config
    return build(RecipeConfig, loads(dump(values | {"stages": stages})))


def checked(samples: Sequence[Sample]) -> list[Score]:
    """The checker, as a ScoreFn."""
    parts = [principles.truth(sample.prompt, sample.completion) for sample in samples]
    return [Score(p.pop("reward"), p) for p in parts]


def sampled(model: Path, prompts: Path) -> Rollouts:
    """Samples of a model at temperature 1, with what the checker says of them."""
    config = SamplingConfig(
        data=str(prompts), text={"fields": {"prompt": "prompt"}}, num_samples=NUM_SAMPLES,
        max_prompt_tokens=8, max_tokens=24,
    )  # fmt: skip
    sampler = Sampler(str(model), config)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    bos = sampler.tokenizer.bos_id
    tasks = [Task(np.array([bos, *sampler.tokenizer.encode(t)], np.int32)) for t in texts]
    return sampler.sample(tasks, checked)


def kl(rollouts: Rollouts, policy: Path, reference: Path) -> float:
    """Nats per completion: mean log-prob under the policy less that under the reference."""
    out, sequences = rollouts.completions, []
    for row in range(len(out.tokens)):
        prompt = rollouts.tasks[row // NUM_SAMPLES].tokens
        tokens = np.concatenate([prompt, out.tokens[row, : out.lengths[row]]]).astype(np.int32)
        sequences.append({"tokens": tokens, "mask": np.arange(len(tokens)) >= len(prompt)})
    batch, _ = pack(sequences, num_rows=len(sequences), row_len=32, packed=False)
    logps = []
    for path in (policy, reference):
        model, params = load_model(path)
        logps.append(np.asarray(score_tokens(model, params, batch, with_entropy=False).logps))
    return float((logps[0] - logps[1]).sum(1, where=batch["mask"]).mean())


def summary(model: Path, prompts: Path, reference: Path | None = None) -> dict[str, float]:
    """Shares of answers that break each principle, and the rest."""
    rollouts = sampled(model, prompts)
    names = (*principles.PRINCIPLES, "helpful")
    found = {name: float(rollouts.part(name).mean()) for name in names}
    found["length"] = float(rollouts.completions.lengths.mean())
    found["kl"] = 0.0 if reference is None else kl(rollouts, model, reference)
    return found


def judge_accuracy(folder: Path, prompts: Path, recipe: RecipeConfig) -> dict[str, Any]:
    """Of pairs of the base's answers to held-out prompts of which one breaks a principle and the
    other does not: how often the judge prefers the right one, asked in one order and in both."""
    rollouts = sampled(folder / "base/model", prompts)
    judge_config: JudgeConfig = recipe.stages["labels"].judge  # type: ignore[union-attr]
    config = judge_config.model_copy(update={"harden": None})
    asked, truth = [], []
    for i, name in itertools.product(range(0, len(rollouts.samples), 2), principles.PRINCIPLES):
        one, other = rollouts.samples[i : i + 2]
        text = one.prompt
        asked.append(Pair(text, one.completion, other.completion, {"question": name}))
        broken = [principles.broken(s.completion)[name] for s in (one, other)]
        truth.append((name, broken[1] - broken[0]))
    with open_judge(config, make_mesh(MeshConfig()), folder / "judged") as judge:
        verdicts = judge.pairwise(asked)
    found: dict[str, Any] = {}
    for name in principles.PRINCIPLES:
        told = [(v, gain) for v, (n, gain) in zip(verdicts, truth, strict=True) if n == name]
        pairs = [(v, gain) for v, gain in told if gain]
        found[name] = {
            "num_pairs": len(pairs),
            "one_order": statistics.mean((v.places[0] > 0.5) == (gain > 0) for v, gain in pairs),
            "both_orders": statistics.mean((v.value > 0.5) == (gain > 0) for v, gain in pairs),
            "ties_found": statistics.mean(
                abs(v.value - 0.5) < judge_config.harden for v, gain in told if not gain
            ),
        }
    places = [v.places[0] for v, (_, gain) in zip(verdicts, truth, strict=True) if not gain]
    found["first_of_ties"] = statistics.mean(places)
    return found


def label_quality(path: Path) -> dict[str, float]:
    """Of the labels that were trained on: how many say something, and how many of it is right."""
    right = wrong = ties = said_of_ties = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        a, b = (principles.broken(r)[record["principle"]] for r in record["responses"])
        first, second = record["ranks"]
        if a == b:
            ties += 1
            said_of_ties += first != second
        elif first != second:
            right += (first < second) == (b > a)
            wrong += (first < second) != (b > a)
    return {
        "num_right": right,
        "num_wrong": wrong,
        "num_ties": ties,
        "num_said_of_ties": said_of_ties,
    }


def measure(seed: int, variants: Sequence[str], overrides: list[str], split: str) -> dict[str, Any]:
    start = time.process_time(), time.perf_counter()
    recipe = recipe_of(seed, overrides)
    folder = Path(recipe.output_dir) / recipe.name
    is_new, noted = not folder.exists(), folder / "seconds.json"
    run_recipe(recipe, command=COMMAND)
    if is_new:  # Of one that was resumed, nobody knows.
        spent = {"cpu": time.process_time() - start[0], "wall": time.perf_counter() - start[1]}
        noted.write_text(json.dumps(spent))
    for variant in variants:
        run_recipe(recipe_of(seed, overrides, variant), command=COMMAND)
    prompts, base = folder / f"world/{split}.jsonl", folder / "base/model"
    sl_cai = folder / "sl_cai/model"
    result: dict[str, Any] = {"seed": seed, "seconds": None}
    if noted.exists():
        result["seconds"] = json.loads(noted.read_text())
    result["judge"] = judge_accuracy(folder, prompts, recipe)
    result["models"] = {
        "base": summary(base, prompts),
        "sl_cai": summary(sl_cai, prompts, base),
        "rl_cai": summary(folder / "rl_cai/model", prompts, sl_cai),
        "dpo": summary(folder / "dpo/model", prompts, sl_cai),
    }
    result["labels"] = {"": label_quality(folder / "labels/preferences.jsonl")}
    for variant in variants:
        before = sl_cai
        if "revisions" in CHANGES[variant]:
            before = folder / f"sl_cai_{variant}/model"
            result["models"][f"sl_cai_{variant}"] = summary(before, prompts, base)
        after = folder / f"rl_cai_{variant}/model"
        result["models"][f"rl_cai_{variant}"] = summary(after, prompts, before)
        result["labels"][variant] = label_quality(folder / f"labels_{variant}/preferences.jsonl")
    return result


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each model, the mean over seeds with the range."""
    columns = (*principles.PRINCIPLES, "helpful", "kl", "length")
    lines = [f"| model | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name in results[0]["models"]:
        cells = []
        for column in columns:
            values = [result["models"][name][column] for result in results]
            scale, form = (100, ".1f") if column in principles.PRINCIPLES else (1, ".2f")
            cell = f"{scale * statistics.mean(values):{form}}"
            if len(values) > 1:
                cell += f" ({scale * min(values):{form}} to {scale * max(values):{form}})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for result in results:
        lines += ["", f"seed {result['seed']}: judge {json.dumps(result['judge'])}",
                  f"labels {json.dumps(result['labels'])}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=[*CHANGES], choices=[*CHANGES])
    parser.add_argument("--split", default="test", help="validation, for trying things out")
    parser.add_argument("overrides", nargs="*", help="key=value, for trying things out")
    args = parser.parse_intermixed_args()
    prepare()
    results = [measure(seed, args.variants, args.overrides, args.split) for seed in args.seeds]
    if args.split == "test":
        write(RESULTS / "constitutional.json", {"num_prompts": 292, "seeds": results})
    print(table(results))


if __name__ == "__main__":
    main()
