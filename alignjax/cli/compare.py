"""`alignjax compare A B RUN|CONFIG [key=value ...]`: how often A's completions are preferred."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  alignjax compare runs/ppo runs/sft runs/ppo
  alignjax compare runs/dpo runs/sft my_compare.yaml num_samples=4
  alignjax compare runs/dpo runs/sft my_compare.yaml --out runs/dpo/compare

A and B are directories of runs or of models. RUN is a grpo or ppo run: its held-out prompts
(data.eval) and its rewards are used. CONFIG is a YAML file with data, text and either rewards or
judge: --print-config shows one for a run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("a", metavar="A", help="a run's or a model's directory")
    parser.add_argument("b", metavar="B", help="the one that it is compared with")
    parser.add_argument("target", metavar="RUN|CONFIG", help="a run's directory or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to set otherwise")
    parser.add_argument(
        "--out", metavar="DIR", help="where compare.json and compare_samples.jsonl go"
    )
    parser.add_argument(
        "--print-config", action="store_true",
        help="print every value and where it came from, and stop",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    from alignjax.cli.eval import of_rollouts
    from alignjax.core.config import build, describe, dump, load, loads
    from alignjax.evals.win_rate import CompareConfig, compare, write_comparison

    models = [f"a={_model(args.a)}", f"b={_model(args.b)}"]
    target = Path(args.target)
    if target.is_dir():
        values = of_rollouts(target)
        tree = loads(dump(values), [*models, *args.overrides], name=str(target / "config.yaml"))
    else:
        tree = load(target, [*models, *args.overrides])
    config = build(CompareConfig, tree)
    if args.print_config:
        print(describe(config, tree), end="")
        return
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.phases.scoring import Rewards

    found = compare(config, Rewards)
    figures = found.as_json()
    print(f"a wins     {found.win_rate}: {config.a} against {config.b}")
    print(f"pairs      {figures['wins']} won, {figures['ties']} tied, {figures['losses']} lost")
    lengths = figures["mean_length"]
    print(f"length     a {lengths['a']:.1f} tokens, b {lengths['b']:.1f}", end="")
    if "longer_is_preferred" in figures:
        print(f"; the longer one is preferred in {100 * figures['longer_is_preferred']:.1f}%")
    else:
        print()
    if "first_is_preferred" in figures:
        first, agree = figures["first_is_preferred"], figures["orders_agree"]
        print(
            f"places     the judge prefers the first one in {100 * first['mean']:.1f}% "
            f"[{100 * first['low']:.1f}, {100 * first['high']:.1f}] (50% if places do not "
            f"matter), and the same one in both orders in {100 * agree['mean']:.1f}%"
        )
    if figures["num_failed"]:
        print(f"failed     {figures['num_failed']} pairs, left out")
    if args.out:
        write_comparison(found, Path(args.out))
        print(f"wrote {args.out}/compare.json and compare_samples.jsonl")


def _model(path: str) -> str:
    """The model of a run, or what is a model itself."""
    return f"{path}/model" if (Path(path) / "model").is_dir() else path
