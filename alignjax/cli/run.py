"""`alignjax run CONFIG [key=value ...]`: run a phase or a recipe, or continue it."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from alignjax.cli.arguments import add_overrides

if TYPE_CHECKING:
    from alignjax.core.config import Config, Tree

EXAMPLES = """\
examples:
  alignjax run configs/smoke/sft.yaml
  alignjax run configs/phases/sft.yaml optimizer.learning_rate=1e-3 loop.steps=50 name=slower
  alignjax run configs/recipes/gsm8k_laptop.yaml stages.grpo.loop.steps=10
  alignjax run configs/recipes/gsm8k_laptop.yaml --print-config

A run writes output_dir/name/: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, model/ (a
Hugging Face directory) and report.png. Ctrl-C saves; the same command continues.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one of ours")
    add_overrides(parser)


def main(args: argparse.Namespace) -> None:
    from alignjax.cli.runtime import join_processes, leaving_soon, terminable
    from alignjax.core.config import describe, find_config, load

    if not args.print_config:
        join_processes()  # First of all, for checking a config may compute something.
    with terminable(), leaving_soon():
        tree = load(find_config(args.config), args.overrides)
        config = check(tree)
        if args.print_config:
            print(describe(config, tree), end="")
            return
        execute(config, command=shlex.join(["alignjax", *sys.argv[1:]]))


def check(tree: Tree) -> Config:
    """The config of a phase, or of a recipe where there are stages. Raises UserError."""
    from alignjax.core.config import build
    from alignjax.core.errors import UserError
    from alignjax.phases.registry import DATA_PHASES, PHASES
    from alignjax.recipes.graph import RecipeConfig

    if "stages" in tree.values:
        config = build(RecipeConfig, tree)
        if ("seed",) in tree.origins:  # Where it was written that a stage takes over.
            for name in config.stages:
                tree.origins.setdefault(("stages", name, "seed"), tree.origins["seed",])
        return config
    phases = PHASES | DATA_PHASES
    expected = f"phase: {' or '.join(phases)}, or stages: ... for a recipe"
    if "phase" not in tree.values:
        raise UserError(f"{tree.origin(())}: expected {expected}; found neither")
    phase = tree.values["phase"]
    if not isinstance(phase, str) or phase not in phases:
        raise UserError(f"{tree.origin(('phase',))}: expected {expected}; got phase: {phase!r}")
    return build(phases[phase][0], tree)


def execute(config: Config, *, command: str) -> None:
    """Runs it, with compilations cached on disk."""
    from alignjax.cli.runtime import prepare
    from alignjax.phases.common import PhaseConfig
    from alignjax.recipes.graph import RecipeConfig, run_recipe
    from alignjax.recipes.stage import run_data_phase, run_phase

    prepare()
    if isinstance(config, RecipeConfig):
        run_recipe(config, command=command)
    elif isinstance(config, PhaseConfig):
        run_phase(config, command=command)
    else:
        run_data_phase(config, command=command)
