"""`alignjax eval RUN|CONFIG [key=value ...]`: accuracy on held-out problems or preferences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

RUN is the directory of a finished grpo or ppo run: its own problems (data.eval) and rewards are
used; or of a reward run, whose model is compared with held-out preferences. CONFIG is a YAML file
with model, data, text and rewards, or with model and preferences: --print-config shows one for a
run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("target", metavar="RUN|CONFIG", help="a run's directory or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to set otherwise")
    parser.add_argument(
        "--out", metavar="DIR", help="where eval.json and eval_samples.jsonl go (default: RUN/eval)"
    )
    parser.add_argument(
        "--print-config", action="store_true",
        help="print every value and where it came from, and stop",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    from alignjax.core.config import dump, load, loads

    target = Path(args.target)
    if target.is_dir():
        tree = loads(dump(_from_run(target)), args.overrides, name=str(target / "config.yaml"))
    else:
        tree = load(target, args.overrides)
    out = Path(args.out) if args.out else (target / "eval" if target.is_dir() else None)
    measure = _preferences if "preferences" in tree.values else _problems
    measure(tree, args.print_config, out)


def _problems(tree: Tree, is_shown: bool, out: Path | None) -> None:
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
    for name, estimate in report.estimates.items():
        print(f"{name:<10} {estimate}")
    print(
        f"reward     {report.reward}\nlength     {report.mean_length:.1f} tokens, "
        f"{100 * report.truncated_frac:.1f}% cut at {config.max_tokens}"
    )
    if report.kl is not None:
        print(f"KL         {report.kl} nats per completion from {config.reference}")
    if report.num_failed:
        print(f"failed     {report.num_failed} rewards (counted as wrong)")
    if out is not None:
        write_report(report, out)
        print(f"wrote {out}/eval.json and eval_samples.jsonl")


def _preferences(tree: Tree, is_shown: bool, out: Path | None) -> None:
    """Of a reward model."""
    from alignjax.core.config import build, describe
    from alignjax.evals.preferences import (
        PreferenceEvalConfig,
        agreement,
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
        write_agreement(found, out)
        print(f"wrote {out}/eval.json and eval_samples.jsonl")


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
            f"{config.get('phase')!r}); for other models write a YAML file with model, data, text "
            "and rewards"
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
        raise UserError(f"{run_dir}: no config.yaml; expected a run's directory or a YAML file")
    return load(path).values
