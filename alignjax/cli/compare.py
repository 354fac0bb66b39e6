"""`alignjax compare A B [RUN|CONFIG]`: how often A is preferred to B; or two evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from alignjax.cli.arguments import add_overrides, model_of, override

if TYPE_CHECKING:
    from alignjax.core.config import Tree

EXAMPLES = """\
examples:
  alignjax compare runs/ppo runs/sft runs/ppo
  alignjax compare runs/dpo runs/sft my_compare.yaml num_samples=4
  alignjax compare runs/dpo runs/sft my_compare.yaml --out runs/dpo/compare

  alignjax compare runs/zero/eval/eval.json before/eval.json
  alignjax compare runs/zero/eval/gsm8k runs/r1/eval/gsm8k --out paired

With RUN or CONFIG, A and B are directories of runs or of models, which answer the same prompts, and
of each two answers one is preferred. RUN is a grpo or ppo run: its held-out prompts (data.eval) and
its rewards are used. CONFIG is a YAML file with data, text and either rewards or judge:
--print-config shows one for a run.

Without, A and B are what `alignjax eval` wrote: eval.json or its directory. The figures are
compared problem by problem: the difference with its 95% interval, and a p-value. Evaluations of
other problems, prompts, sampling or scoring are refused, and what differs is said.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("a", metavar="A", help="a run's or a model's directory, or an evaluation")
    parser.add_argument("b", metavar="B", help="the one that it is compared with")
    parser.add_argument(
        "target", metavar="RUN|CONFIG", nargs="?",
        help="a run's directory or a YAML file; leave it out for two evaluations",
    )  # fmt: skip
    add_overrides(parser)
    parser.add_argument(
        "--out", metavar="DIR",
        help="where compare.json goes, and of models the pairs, compare_samples.jsonl",
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    if args.target is None:
        compare_files(Path(args.a), Path(args.b), Path(args.out) if args.out else None)
        return
    from alignjax.cli.eval import of_rollouts
    from alignjax.core.config import dump, load, loads

    models = [override("a", model_of(args.a)), override("b", model_of(args.b))]
    target = Path(args.target)
    if target.is_dir():
        values = of_rollouts(target)
        tree = loads(dump(values), [*models, *args.overrides], name=str(target / "config.yaml"))
    else:
        tree = load(target, [*models, *args.overrides])
    sample_both(tree, args.print_config, Path(args.out) if args.out else None, name="compare")


def compare_files(a: Path, b: Path, out: Path | None) -> None:
    """Prints the difference of every figure that two evaluations have of the same problems."""
    import json

    from alignjax.evals.paired import compare_evaluations, read_evaluation

    found = compare_evaluations(read_evaluation(a), read_evaluation(b))
    width = max(map(len, found))
    for name, one in found.items():
        print(f"{name:<{width}}  {one}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({name: one.as_json() for name, one in found.items()}, indent=2) + "\n"
        (out / "compare.json").write_text(text, encoding="utf-8")
        print(f"wrote {out}/compare.json")


def sample_both(tree: Tree, is_shown: bool, out: Path | None, *, name: str) -> None:
    """Has two models answer, and prints how often the first one is preferred.

    Args:
      tree: of a `CompareConfig`.
      is_shown: print the config, and stop.
      out: where NAME.json goes, and what belongs to it.
    """
    from alignjax.core.config import build, describe
    from alignjax.evals.win_rate import CompareConfig, compare, write_comparison

    config = build(CompareConfig, tree)
    if is_shown:
        print(describe(config, tree), end="")
        return
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.phases.judges import open_judge
    from alignjax.phases.scoring import Rewards

    found = compare(config, Rewards, lambda judge, mesh: open_judge(judge, mesh, out))
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
    if out is not None:
        write_comparison(found, out, name=name)
        print(f"wrote {out}/{name}.json and {name}_samples.jsonl")
