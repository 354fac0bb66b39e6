"""`alignjax eval RUN|CONFIG [key=value ...]`: accuracy on held-out problems, with its interval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  alignjax eval runs/r1_zero/zero
  alignjax eval runs/r1_zero/zero num_samples=16 num_problems=100 temperature=0.7
  alignjax eval runs/r1_zero/zero model=runs/r1_zero/base/model --out before
  alignjax eval my_eval.yaml

RUN is the directory of a finished grpo run: its own problems (data.eval) and rewards are used.
CONFIG is a YAML file with model, data, text and rewards: --print-config shows one for a run.
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
    from alignjax.core.config import build, describe, dump, load, loads
    from alignjax.evals.run import EvalConfig, evaluate, write_report

    target = Path(args.target)
    if target.is_dir():
        tree = loads(dump(_from_run(target)), args.overrides, name=str(target / "config.yaml"))
    else:
        tree = load(target, args.overrides)
    config = build(EvalConfig, tree)
    if args.print_config:
        print(describe(config, tree), end="")
        return
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.phases.scoring import Rewards

    report = evaluate(config, Rewards)
    for name, estimate in report.estimates.items():
        print(f"{name:<10} {estimate}")
    print(
        f"reward     {report.mean_reward:.3f}\nlength     {report.mean_length:.1f} tokens, "
        f"{100 * report.truncated_frac:.1f}% cut at {config.max_tokens}"
    )
    if report.num_failed:
        print(f"failed     {report.num_failed} rewards (counted as wrong)")
    out = Path(args.out) if args.out else (target / "eval" if target.is_dir() else None)
    if out is not None:
        write_report(report, out)
        print(f"wrote {out}/eval.json and eval_samples.jsonl")


def _from_run(run_dir: Path) -> dict[str, Any]:
    """What an evaluation needs of the config of a grpo run."""
    from alignjax.core.config import load
    from alignjax.core.errors import UserError

    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: no config.yaml; expected a run's directory or a YAML file")
    config = load(path).values
    data = config.get("data") or {}
    if config.get("phase") != "grpo" or data.get("eval") is None:
        raise UserError(
            f"{path}: expected phase grpo with data.eval (found {config.get('phase')!r}); for "
            "other models write a YAML file with model, data, text and rewards"
        )
    rollout = config["rollout"]
    return {
        "model": str(run_dir / "model"),
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
