"""`alignjax demo NAME`: a whole recipe, told as it happens, with a picture at the end."""

from __future__ import annotations

import argparse
import shlex
import sys

EXAMPLES = """\
examples:
  alignjax demo r1-zero
  alignjax demo r1-zero seed=1 name=r1_zero_seed1
  alignjax demo r1-zero stages.zero.optimizer.learning_rate=1e-4 name=slower

Everything goes to runs/NAME/; a second run continues, or says that it is done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("name", choices=["r1-zero"], metavar="NAME", help="r1-zero")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to set otherwise")


def main(args: argparse.Namespace) -> None:
    from alignjax.core.config import build, find_config, load
    from alignjax.core.errors import UserError
    from alignjax.recipes.graph import RecipeConfig

    tree = load(find_config("recipes/r1_zero"), args.overrides)
    config = build(RecipeConfig, tree)
    for name in ("zero", "control"):
        evaluation = config.stages[name].evaluation
        if not (evaluation.num_samples and evaluation.num_shown and evaluation.greedy):
            raise UserError(
                f"stages.{name}.evaluation: the demo tells of sampled and greedy answers, so "
                "num_samples and num_shown are at least 1 and greedy is true; alignjax run "
                "recipes/r1_zero takes any"
            )
    for name in ("zero", "control", "zero_eval"):
        if "reflects" not in config.stages[name].rewards.functions:
            raise UserError(
                f"stages.{name}.rewards.functions: the demo tells of reflects as well; leave it in"
            )

    from alignjax.cli.runtime import prepare
    from alignjax.recipes import r1_zero
    from alignjax.recipes.graph import run_recipe

    prepare()
    print(r1_zero.INTRODUCTION)
    folder = run_recipe(config, command=shlex.join(["alignjax", *sys.argv[1:]]))
    picture = folder / "r1_zero.png"
    r1_zero.draw(folder, picture)
    print(r1_zero.tell(folder))
    print(f"Picture: {picture}")
    print(f"Try it:  alignjax generate {folder}/zero/model --prompt 12*03-09=")
