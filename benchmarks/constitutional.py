"""Constitutional AI where the truth is known, with several seeds -> tables, a picture, a JSON file.

    python benchmarks/constitutional.py --seeds 0 1 2

Runs configs/recipes/constitutional.yaml for each seed, and then variants of it from the same base
model: a principle left out of the constitution; labels by the checker itself, the same with 20% of
them turned round, the same by a judge that is fond of a word, and labels of the base in one order
only; demonstrations of helpfulness among the revisions; RL for 200 steps. Then samples answers to
held-out prompts from every model, and has the checker count the principles that they break.

Runs go to runs/; what is finished is not run or measured again, and what other calls have finished
is in the tables, too: so variants may be run for some of the seeds alone.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import REPO, RESULTS, write
from table import table

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
from alignjax.report import stages_picture
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
FAVOURITE = "truly"


def _labels_of(name: str, **args: Any) -> dict[str, dict[str, Any]]:
    judge = {"name": name, "function": "alignjax.recipes.principles.true_judge", "args": args}
    return {"labels": {"judge": judge}}


CHANGES |= {
    "true_labels": _labels_of("truth"),
    "noisy_labels": _labels_of("noisy", noise=0.2),
    "one_order": {"labels": {"judge.both_orders": False}},
    "fond_labels": _labels_of("fond", fond_of=FAVOURITE),
    "helpful_mixed": {
        "sl_cai": {"data.train": ["${revisions}/revisions.jsonl", "${world}/helpful.jsonl"]}
    },
    "long_rl": {"rl_cai": {"loop.steps": 200}},
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
    found["favourite"] = statistics.mean(FAVOURITE in s.completion for s in rollouts.samples)
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


def run(seed: int, variant: str, overrides: Sequence[str]) -> None:
    """To its end; notes the time of a first run of the recipe."""
    start = time.process_time(), time.perf_counter()
    recipe = recipe_of(seed, overrides, variant)
    folder = Path(recipe.output_dir) / recipe.name
    is_new = not folder.exists()
    run_recipe(recipe, command=COMMAND)
    if is_new:  # Of one that was resumed, nobody knows.
        spent = {"cpu": time.process_time() - start[0], "wall": time.perf_counter() - start[1]}
        (folder / "seconds.json").write_text(json.dumps(spent))


def measure(seed: int, overrides: Sequence[str], split: str) -> dict[str, Any]:
    """Of everything that is finished; each figure is measured once, and kept beside the runs."""
    recipe = recipe_of(seed, overrides)
    folder = Path(recipe.output_dir) / recipe.name
    prompts, noted = folder / f"world/{split}.jsonl", folder / "seconds.json"

    def kept(name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = folder / "measured" / f"{split}_{name}.json"
        if not path.exists():
            found = find()
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())

    def of(name: str, before: str = "") -> dict[str, float]:
        reference = folder / before / "model" if before else None
        return kept(name, lambda: summary(folder / name / "model", prompts, reference))

    models = {"base": of("base"), "sl_cai": of("sl_cai", "base"), "rl_cai": of("rl_cai", "sl_cai")}
    models["dpo"] = of("dpo", "sl_cai")
    labels = {"": label_quality(folder / "labels/preferences.jsonl")}
    for variant, changed in CHANGES.items():
        if not (folder / f"rl_cai_{variant}/model").exists():
            continue
        before = "sl_cai"
        if not changed.keys().isdisjoint(("revisions", "sl_cai")):
            before = f"sl_cai_{variant}"
            models[before] = of(before, "base")
        models[f"rl_cai_{variant}"] = of(f"rl_cai_{variant}", before)
        labeled = folder / f"labels_{variant}/preferences.jsonl"
        labels |= {variant: label_quality(labeled)} if labeled.exists() else {}
    return {
        "seed": seed,
        "seconds": json.loads(noted.read_text()) if noted.exists() else None,
        "judge": kept("judge", lambda: judge_accuracy(folder, prompts, recipe)),
        "models": models,
        "labels": labels,
    }


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the models, the judge and its labels, means over seeds with the range."""

    def seeds(part: str) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for result in results for name in result[part])
        return {n: [r[part][n] for r in results if n in r[part]] for n in names}

    judge = seeds("judge")
    bias = [{"first": share} for share in judge.pop("first_of_ties")]
    models, labels = seeds("models"), seeds("labels")
    shares = dict.fromkeys((*principles.PRINCIPLES, "favourite"), ".1%")
    num = {f"{name} ({len(of)})": of for name, of in models.items()}
    texts = [
        table(num, shares | dict.fromkeys(("helpful", "kl"), ".2f") | {"length": ".1f"}),
        table(judge, dict.fromkeys(("one_order", "both_orders", "ties_found"), ".1%")),
        table({"of pairs that are alike": bias}, {"first": ".2f"}),
        table(labels, dict.fromkeys(labels[""][0], ".0f"), title="labels"),
    ]
    return "\n".join(texts)


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel of bars for each principle: stages, and the control without it; means over seeds."""
    shares = {}
    for name in principles.PRINCIPLES:
        shown = {
            "base": "base",
            "SL-CAI": "sl_cai",
            "RL-CAI": "rl_cai",
            "SL, out": f"sl_cai_without_{name}",
            "RL, out": f"rl_cai_without_{name}",
        }
        found = {
            title: [r["models"][model][name] for r in results if model in r["models"]]
            for title, model in shown.items()
        }
        shares[f"Breaks {name}"] = {k: statistics.mean(of) for k, of in found.items() if of}
    stages_picture(
        path,
        shares,
        [],
        title="Constitutional AI, in a world with known truth",
        subtitle="Share of answers to held-out prompts that break a principle; out: it was left "
        f"out of the constitution. Means of up to {len(results)} seeds.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=[*CHANGES], choices=[*CHANGES])
    parser.add_argument("--split", default="test", help="validation, for trying things out")
    parser.add_argument("overrides", nargs="*", help="key=value, for trying things out")
    args = parser.parse_intermixed_args()
    prepare()
    for variant, seed in itertools.product(["", *args.variants], args.seeds):
        run(seed, variant, args.overrides)
    results = [measure(seed, args.overrides, args.split) for seed in args.seeds]
    if args.split == "test":
        write(RESULTS / "constitutional.json", {"num_prompts": 292, "seeds": results})
        picture(results, REPO / "docs" / "img" / "constitutional.png")
    print(tables(results))


if __name__ == "__main__":
    main()
