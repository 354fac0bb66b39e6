"""`alignjax eval MODEL --task TASK`, or RUN or CONFIG, which say themselves what is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignjax.cli.arguments import add_overrides, model_of, override

if TYPE_CHECKING:
    from alignjax.core.config import Tree

EXAMPLES = """\
examples:
  alignjax eval runs/r1_zero/zero
  alignjax eval runs/r1_zero/zero num_samples=16 num_problems=100 temperature=0.7
  alignjax eval runs/r1_zero/zero model=runs/r1_zero/base/model --out before
  alignjax eval runs/ppo correct=null reference=runs/sft/model
  alignjax eval runs/reward
  alignjax eval my_eval.yaml

  alignjax eval Qwen/Qwen3-0.6B-Base --task gsm8k --out greedy
  alignjax eval runs/sft --task gsm8k data=gsm8k/test.jsonl temperature=0.6 num_samples=16
  alignjax eval MODEL --task gsm8k text.chat=true shots=[] max_tokens=1024
  alignjax eval MODEL --task math data=math/test.jsonl
  alignjax eval MODEL --task mcq data=questions.jsonl
  alignjax eval MODEL --task arithmetic data.largest=20 data.num_terms=[2]
  alignjax eval MODEL --task win_rate b=OTHER data=prompts.jsonl judge.function=my_judge.better
  alignjax eval REWARD_MODEL --task preference preferences=held_out.jsonl
  alignjax eval MODEL --task my_task.yaml

  alignjax compare runs/a/eval runs/b/eval      differences of two evaluations, with p-values

MODEL is a Hugging Face directory, the id of a model on the Hub, or a run's directory. TASK is one
that ships (see above; arc as well) or a YAML file: it says where the problems are, how they are
asked and what is right, and every value of it can be set otherwise. --print-config shows them.
temperature=0 is greedy; with num_samples=16 pass@1 is the mean over 16, beside pass@k and maj@k.

RUN is the directory of a finished grpo or ppo run: its own problems (data.eval) and rewards are
used; or of a reward run, whose model is compared with held-out preferences. CONFIG is a YAML file
like a task, with the model in it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument(
        "target", metavar="MODEL|RUN|CONFIG", help="a model, a run's directory or a YAML file"
    )
    add_overrides(parser)
    parser.add_argument("--task", metavar="TASK", help="what to measure of MODEL")
    parser.add_argument(
        "--out", metavar="DIR",
        help="where eval.json, eval_problems.jsonl and eval_samples.jsonl go (default: RUN/eval, "
        "with --task RUN/eval/TASK; of other models nothing is kept)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    tree, out = _task_of_model(args) if args.task is not None else _own_task(args)
    name = tree.values.get("kind", "preference" if "preferences" in tree.values else "answers")
    if not isinstance(name, str) or name not in KINDS:
        from alignjax.core.errors import UserError

        raise UserError(
            f"{tree.origin(('kind',))}: kind: expected one of {', '.join(KINDS)}, got {name!r}"
        )
    KINDS[name](tree, args.print_config, Path(args.out) if args.out else out)


def _task_of_model(args: argparse.Namespace) -> tuple[Tree, Path | None]:
    """A task's config with the model in it, and where the figures go unless that is said."""
    from alignjax.core.config import load

    path = _find_task(args.task)
    kind = load(path).values.get("kind")
    model = override("a" if kind == "win_rate" else "model", model_of(args.target))
    is_run = (Path(args.target) / "model").is_dir()
    return (
        load(path, [model, *args.overrides]),
        Path(args.target) / "eval" / path.stem if is_run else None,
    )


def _find_task(name: str) -> Path:
    """A YAML file, or a task that ships. Raises UserError if there is none."""
    import difflib

    from alignjax.core.config import shipped_configs
    from alignjax.core.errors import UserError

    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {
        config.removeprefix("tasks/"): path
        for config, path in shipped_configs().items()
        if config.startswith("tasks/")
    }
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        raise UserError(f"--task {name}: no such task; {hint} (or a file that ends in .yaml)")
    return known[name]


def _own_task(args: argparse.Namespace) -> tuple[Tree, Path | None]:
    """What a run or a YAML file says itself is to be measured."""
    from alignjax.core.config import dump, load, loads

    target = Path(args.target)
    if target.is_dir():
        name = str(target / "config.yaml")
        return loads(dump(_from_run(target)), args.overrides, name=name), target / "eval"
    return load(target, args.overrides), None


def _answers(tree: Tree, is_shown: bool, out: Path | None) -> None:
    """Of a model that answers."""
    from alignjax.core.config import build, describe
    from alignjax.evals.run import EvalConfig, evaluate, write_report

    config = build(EvalConfig, tree)
    if is_shown:
        print(describe(config, tree), end="")
        return
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.phases.scoring import Rewards

    report = evaluate(config, Rewards)
    for line in report.lines():
        print(line)
    if out is not None:
        write_report(report, out)
    _say_where(out)


def _choices(tree: Tree, is_shown: bool, out: Path | None) -> None:
    """Of a model that chooses."""
    from alignjax.core.config import build, describe
    from alignjax.evals.choices import ChoiceConfig, evaluate_choices, write_choices

    config = build(ChoiceConfig, tree)
    if is_shown:
        print(describe(config, tree), end="")
        return
    from alignjax.cli.runtime import prepare

    prepare()
    found = evaluate_choices(config)
    names = {"accuracy": "likeliest", "accuracy_per_token": "per token"}
    for name, estimate in found.estimates.items():
        print(f"{names.get(name, name):<10} {estimate}")
    figures = found.as_json()
    print(f"chance     {100 * figures['chance']:.1f}%")
    if "no_letter_frac" in figures:
        print(f"no letter  {100 * figures['no_letter_frac']:.1f}% of what it said (wrong)")
    if out is not None:
        write_choices(found, out)
    _say_where(out)


def _preferences(tree: Tree, is_shown: bool, out: Path | None) -> None:
    """Of a reward model."""
    from alignjax.core.config import build, describe
    from alignjax.evals.preferences import (
        PreferenceEvalConfig,
        agreement,
        made_of,
        open_held_out,
        write_agreement,
    )

    config = build(PreferenceEvalConfig, tree)
    if is_shown:
        print(describe(config, tree), end="")
        return
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.phases.scoring import RewardModel
    from alignjax.rewards.combine import RewardModelConfig
    from alignjax.sharding import MeshConfig, make_mesh
    from alignjax.text import load_tokenizer

    source, tokenizer = open_held_out(config), load_tokenizer(config.model)
    # As they are, not normalised: no order depends on it.
    spec = RewardModelConfig(
        path=config.model, mean=0.0, std=1.0, compute_dtype=config.compute_dtype
    )
    model = RewardModel("model", spec, tokenizer, make_mesh(MeshConfig()))
    context = model.model.decoder.config.max_position_embeddings
    config = config.model_copy(update={"max_len": min(config.max_len, context)})
    found = agreement(config, source, tokenizer, model.score_ids)
    left = found.num_left_out + found.num_dropped
    print(f"accuracy   {found.accuracy}")
    print(f"margin     {found.margin:.3f} over {found.num_pairs} pairs")
    if left:
        print(
            f"left out   {found.num_dropped} preferences longer than {config.max_len} tokens, "
            f"{found.num_left_out} that prefer no response to another"
        )
    if out is not None:
        write_agreement(found, out, made_of(config, found))
    _say_where(out)


def _win_rate(tree: Tree, is_shown: bool, out: Path | None) -> None:
    """Of two models that answer."""
    from alignjax.cli.compare import sample_both

    if isinstance(tree.values.get("b"), str):
        tree.values["b"] = model_of(tree.values["b"])
    sample_both(tree, is_shown, out, name="eval")


KINDS: dict[str, Callable[[Tree, bool, Path | None], None]] = {
    "answers": _answers,
    "choices": _choices,
    "preference": _preferences,
    "win_rate": _win_rate,
}
"""What can be measured, by the `kind` of a task."""


def _say_where(out: Path | None) -> None:
    if out is None:
        print("kept       nothing; --out DIR keeps figures and answers")
    else:
        print(f"wrote {out}/eval.json, eval_problems.jsonl and eval_samples.jsonl")


def _from_run(run_dir: Path) -> dict[str, Any]:
    """What an evaluation needs of the config of a run."""
    config = _config_of(run_dir)
    if config.get("phase") == "reward" and config["data"].get("eval") is not None:
        data = config["data"]
        return {
            "model": str(run_dir / "model"),
            "preferences": data["eval"],
            **{name: data[name] for name in ("layout", "annotators", "faulty", "text")},
            "max_len": data["row_len"],
            "overlong": data["overlong"],
            "compute_dtype": config["model"]["compute_dtype"],
        }
    return {"model": str(run_dir / "model"), **of_rollouts(run_dir)}


def of_rollouts(run_dir: Path) -> dict[str, Any]:
    """Prompts, rewards and sampling of a run that samples. Raises UserError if it is none."""
    from alignjax.core.errors import UserError

    config = _config_of(run_dir)
    data = config.get("data") or {}
    if not {"rollout", "rewards"} <= config.keys() or data.get("eval") is None:
        raise UserError(
            f"{run_dir / 'config.yaml'}: expected phase grpo or ppo with data.eval (found "
            f"{config.get('phase')!r}); for other models say what to measure with --task, or in a "
            "YAML file with model, data, text and rewards"
        )
    rollout = config["rollout"]
    return {
        "data": data["eval"],
        "text": data["text"],
        "rewards": config["rewards"],
        "temperature": rollout["temperature"],
        "max_prompt_tokens": rollout["max_prompt_tokens"],
        "overlong": data["overlong"],
        "max_tokens": rollout["max_tokens"],
        "stop_tokens": rollout["stop_tokens"],
        "compute_dtype": config["model"]["compute_dtype"],
    }


def _config_of(run_dir: Path) -> dict[str, Any]:
    from alignjax.core.config import load
    from alignjax.core.errors import UserError

    path = run_dir / "config.yaml"
    if not path.is_file():
        hint = "; it is a model: say what to measure of it with --task"
        raise UserError(
            f"{run_dir}: no config.yaml; expected a run's directory or a YAML file"
            + (hint if (run_dir / "config.json").is_file() else "")
        )
    return load(path).values
