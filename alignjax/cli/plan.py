"""`alignjax plan CONFIG --topology v5e:16x16`: memory and time of a run, before it is paid for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignjax.plan.chips import Chip
    from alignjax.plan.report import Plan
    from alignjax.plan.shapes import Shapes
    from alignjax.plan.topology import Topology

EXAMPLES = """\
examples:
  alignjax plan configs/phases/sft.yaml --topology local:8
  alignjax plan configs/recipes/dpo_llama3_8b_tpu.yaml --topology v5p:4x4x4
  alignjax plan chat.yaml --topology '2x v5e:16x16' mesh.fsdp=64 model.remat=true
  alignjax plan chat.yaml --topology v5e:4x4 --json plan.json

topologies:
  v5e:16x16 v6e:8x8 v5p:4x4x8 v4:4x4x4 tpu7x:4x4x4, with '2x ' before it or --slices 2 for two
  slices; local: the devices that are here; local:8: eight that a CPU pretends to have

Every program that the phases of CONFIG would run is compiled for the devices, which need not be
there, and none is run. No data, no weights and no tokenizer are read: of a model only config.json,
from its directory, from the Hub's cache, or one that ships with alignjax for models that its
configs name. What a stage of a recipe writes need not be there.

Printed for each program: how often it runs in an iteration, GiB on each device, FLOPs and bytes of
one device, the time at the peaks of the chip and what bounds it. The exit status is 0 if all fits,
3 if not. Compiling takes minutes for a large model, on the host's CPU.
"""
DOES_NOT_FIT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one of ours")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to set otherwise")
    parser.add_argument(
        "--topology", required=True, metavar="T", help="what to plan for: v5e:16x16, local, ..."
    )
    parser.add_argument("--slices", type=int, metavar="N", help="so many slices of it")
    parser.add_argument("--stage", metavar="NAME", help="one stage alone, where CONFIG is a recipe")
    parser.add_argument(
        "--model-config", action="append", default=[], metavar="MODEL=FILE",
        help="the config.json of a model that CONFIG names and that is not here",
    )  # fmt: skip
    parser.add_argument(
        "--no-search", action="store_true", help="do not look for what would fit where it does not"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures there")


def main(args: argparse.Namespace) -> int:
    import json

    from alignjax.core.config import find_config, load
    from alignjax.core.errors import UserError
    from alignjax.plan.topology import Topology, prepare

    if args.slices is not None and args.slices < 1:
        raise UserError(f"--slices {args.slices}: expected at least 1")
    topology = Topology.parse(args.topology, args.slices)
    given = _given(args.model_config)
    out = None if args.json is None else Path(args.json)
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--json {out}: there is no directory {out.parent}")
    tree = load(find_config(args.config), args.overrides)
    prepare(topology)  # Before anything imports jax.
    import jax
    from rich.console import Console

    from alignjax.cli.run import check
    from alignjax.cli.runtime import prepare as keep_compilations
    from alignjax.plan.report import show
    from alignjax.plan.shapes import Shapes

    keep_compilations()
    if not topology.is_local:  # What was compiled for devices that are not there cannot be read.
        jax.config.update("jax_enable_compilation_cache", False)
    stages = _stages(check(tree), args.stage)
    found = plan(args.config, stages, topology, Shapes(given), search=not args.no_search)
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # In a file there is room for the whole table.
    show(found, console)
    if out is not None:
        out.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
        print(f"wrote {out}")
    return 0 if found.fits else DOES_NOT_FIT


def plan(
    name: str, stages: Mapping[str, Any], topology: Topology, shapes: Shapes, *, search: bool
) -> Plan:
    """Plans the stages in turn; see `plan.report.Plan`.

    Args:
      stages: name -> config of a phase, those to be planned and those that only say what they will
        write (`_Known`).
      search: look for what would fit where a stage does not.
    """
    import jax

    from alignjax.core.errors import UserError
    from alignjax.plan import search as remedies
    from alignjax.plan.chips import CHIPS
    from alignjax.plan.measure import plan_phase
    from alignjax.plan.phases import programs_of
    from alignjax.plan.programs import NotPlannedError
    from alignjax.plan.report import Plan
    from alignjax.plan.topology import devices
    from alignjax.train.progress import Progress

    progress, there = Progress(), devices(topology)
    num_chips = topology.num_chips or len(there)
    chip = _local_chip(there, progress.note) if topology.is_local else CHIPS[topology.chip]
    found = Plan(name, str(topology), len(there), num_chips, chip, [], versions=_versions(topology))
    for stage, (config, is_planned) in stages.items():
        _add_artifacts(config, shapes)
        if not is_planned:
            continue
        try:
            mesh, programs = programs_of(config, there, shapes)
        except NotPlannedError as error:
            found.left_out[stage] = str(error)
            continue
        except UserError as error:
            raise UserError(f"{stage}: {error}") from error
        one = plan_phase(stage, config.phase, programs, mesh, chip, num_chips, progress.note)
        found.phases.append(one)
        if not one.fits and chip is not None and search:
            limit = one.limit_bytes or 0
            failed = {
                program.name
                for program in one.programs
                if program.memory is None or program.needed_bytes > limit
            }
            found.remedies[stage] = remedies.search(
                config, there, shapes, chip, failed, progress.note
            )
    jax.clear_caches()
    return found


def _local_chip(there: list[Any], say: Callable[[str], None]) -> Chip | None:
    """What a device of this machine can do: measured on a CPU, whose devices share its memory."""
    from alignjax.plan.local_chip import measured_cpu

    if there[0].platform != "cpu":
        return None
    say("measuring what a core of this machine can do")
    chip = measured_cpu()
    return chip._replace(hbm_bytes=chip.hbm_bytes / len(there))


def _stages(config: Any, only: str | None) -> dict[str, tuple[Any, bool]]:
    """Name of a stage -> its config, and whether it is to be planned."""
    from alignjax.core.errors import UserError
    from alignjax.recipes.graph import EvalStageConfig, FilesConfig, RecipeConfig, TokenizerConfig

    if not isinstance(config, RecipeConfig):
        if only is not None:
            raise UserError(f"--stage {only}: this config is one phase, without stages")
        return {config.name: (config, True)}
    if only is not None and only not in config.stages:
        raise UserError(f"--stage {only}: expected one of {', '.join(config.stages)}")
    no_program = FilesConfig | TokenizerConfig | EvalStageConfig
    return {
        name: (stage, only in (None, name) and not isinstance(stage, no_program))
        for name, stage in config.stages.items()
    }


def _add_artifacts(config: Any, shapes: Shapes) -> None:
    """What later stages may name."""
    from alignjax.phases.common import PhaseConfig
    from alignjax.recipes.graph import TokenizerConfig

    where = f"{config.output_dir}/{config.name}"
    if isinstance(config, TokenizerConfig):
        shapes.add_tokenizer(where, config.vocab_size)
    elif isinstance(config, PhaseConfig):
        shapes.add_stage(f"{where}/model", config)


def _given(texts: list[str]) -> dict[str, Path]:
    from alignjax.core.errors import UserError

    found = {}
    for text in texts:
        model, is_pair, file = text.partition("=")
        if not is_pair or not Path(file).is_file():
            raise UserError(
                f"--model-config {text}: expected MODEL=FILE: MODEL as CONFIG names it, FILE its "
                "config.json"
            )
        found[model] = Path(file)
    return found


def _versions(topology: Topology) -> dict[str, str]:
    from importlib import metadata

    names = ["jax", "jaxlib", *([] if topology.is_local else ["libtpu"])]
    return {name: metadata.version(name) for name in names}
