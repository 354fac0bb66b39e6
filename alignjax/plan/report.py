"""What was planned -> tables for a terminal, and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from alignjax.plan.chips import Chip
from alignjax.plan.measure import USABLE, Measured, PhasePlan
from alignjax.plan.search import Remedy

GIB = 2.0**30
KINDS = {False: "train", True: "sample"}
"""Whether a program runs on devices of its own (`Measured.is_apart`) -> what these do."""


@dataclass(frozen=True)
class Plan:
    """Of a config on a topology.

    Attributes:
      left_out: stages that are not planned, and why.
      remedies: by stage, what would fit.
      versions: of what compiled.
    """

    config: str
    topology: str
    num_devices: int
    num_chips: int
    chip: Chip | None
    phases: list[PhasePlan]
    left_out: dict[str, str] = field(default_factory=dict)
    remedies: dict[str, Remedy] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Of what devices cost: those that are here are no chips that somebody rents out."""
        return "device-hours" if self.topology.startswith("local") else "chip-hours"

    @property
    def fits(self) -> bool:
        return all(phase.fits for phase in self.phases)

    def as_json(self) -> dict[str, Any]:
        hours = [phase.chip_hours for phase in self.phases]
        return {
            "config": self.config,
            "topology": self.topology,
            "num_devices": self.num_devices,
            "num_chips": self.num_chips,
            "chip": None if self.chip is None else self.chip._asdict(),
            "fits": self.fits,
            "chip_hours": None if None in hours else sum(hours),  # type: ignore[arg-type]
            "stages": [phase.as_json() for phase in self.phases],
            "left_out": self.left_out,
            "remedies": {name: remedy.as_json() for name, remedy in self.remedies.items()},
            "versions": self.versions,
        }


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    devices = f"{plan.num_devices} device{'s' if plan.num_devices > 1 else ''}"
    console.print(f"{plan.config} on {plan.topology}: {devices}", markup=False)
    for phase in plan.phases:
        _show_phase(phase, plan, console)
    for stage, why in plan.left_out.items():
        console.print(f"\n{stage}: not planned: {why}", markup=False)
    hours = [phase.chip_hours for phase in plan.phases if phase.chip_hours is not None]
    if len(plan.phases) > 1 and len(hours) == len(plan.phases):
        console.print(f"\nall stages: at least {_number(sum(hours))} {plan.unit}", markup=False)
    if plan.chip is not None:
        console.print(
            "\nTimes are bounds: what the devices need at the peaks of the chip, if nothing else "
            "held them up.",
            markup=False,
        )


def _show_phase(phase: PhasePlan, plan: Plan, console: Console) -> None:
    mesh, is_apart = _mesh(phase.mesh), phase.sampling_mesh is not None
    if phase.sampling_mesh is not None:
        mesh += f", and to sample {_mesh(phase.sampling_mesh)}"
    console.print(f"\n{phase.stage} (phase {phase.phase}): mesh {mesh}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("program", no_wrap=True)
    if is_apart:
        table.add_column("devices", no_wrap=True)
    for name in ("runs", "GiB", "TFLOP", "HBM GB", "ICI GB", "DCN GB", "ms", "bound", "compile s"):
        table.add_column(name, justify="right", no_wrap=True)
    for program in phase.programs:
        name, *others = _row(program)
        table.add_row(name, *([KINDS[program.is_apart]] if is_apart else []), *others)
    console.print(table)
    for kind in (False, True):
        programs = [program for program in phase.programs if program.is_apart == kind]
        if programs:
            of = f"device ({KINDS[kind]})" if is_apart else "device"
            console.print(_memory(programs, of, phase.limit_bytes, plan.chip), markup=False)
    for text in _summary(phase, plan.unit):
        console.print(text, markup=False)
    remedy = plan.remedies.get(phase.stage)
    console.print(f"  {_verdict(phase, remedy)}", markup=False)
    for note in phase.notes:
        console.print(f"  note: {note}", markup=False)


def _row(program: Measured) -> list[str]:
    given = [program.name, _number(program.times), f"{program.needed_bytes / GIB:.2f}"]
    compiled = f"{program.trace_s + program.compile_s:.0f}"
    costs, seconds = program.costs, program.time
    if costs is None:
        return [*given, *["-"] * 6, compiled]

    def moved(crosses: bool) -> float:
        found = (c for c in costs.collectives if c.crosses_slices == crosses)
        return sum(c.times * c.bytes for c in found)

    return [
        *given,
        f"{costs.flops / 1e12:.3g}",
        f"{costs.bytes / 1e9:.3g}",
        f"{moved(False) / 1e9:.3g}",
        f"{moved(True) / 1e9:.3g}",
        "-" if seconds is None else f"{1e3 * seconds.seconds:.3g}",
        "-" if seconds is None else seconds.bound,
        compiled,
    ]


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device"


def _memory(
    programs: Iterable[Measured], of: str, limit_bytes: float | None, chip: Chip | None
) -> str:
    """What the program that takes most holds on each device."""
    largest = max(programs, key=lambda program: program.needed_bytes)
    limit = "" if limit_bytes is None else f" of {limit_bytes / GIB:.2f}"
    if chip is not None and limit_bytes is not None:
        limit += f" ({USABLE:.0%} of {chip.hbm_bytes / GIB:.0f})"
    total = f"{largest.needed_bytes / GIB:.2f}{limit} GiB"
    if largest.memory is None:
        return f"  memory of each {of} in {largest.name}: {total}: the compiler found no room"
    parts = sorted(largest.memory.parts.items(), key=lambda part: -part[1])
    shown = [f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.005 * GIB]
    few = [f"{name} {size / 2**20:.1f} MiB" for name, size in parts[:4]]
    return f"  memory of each {of} in {largest.name}: {total}: {', '.join(shown or few)}"


def _summary(phase: PhasePlan, unit: str) -> Iterable[str]:
    if phase.iteration_s is not None and phase.iteration_s > 0:
        assert phase.tokens_per_second is not None and phase.chip_hours is not None
        yield (
            f"  an iteration takes at least {_number(phase.iteration_s)} s: at most "
            f"{phase.tokens_per_second:,.0f} tokens/s; {phase.steps:,} iterations at least "
            f"{_number(phase.chip_hours)} {unit}"
        )
    for program in phase.programs:
        if program.utilisation is not None and program.time is not None:
            yield (
                f"  {program.name}: utilisation at most {program.utilisation:.0%} (of the model's "
                f"own FLOPs), bound by {program.time.bound}"
            )
        if program.costs is not None and program.costs.unknown_loops:
            number = len(program.costs.unknown_loops)
            yield f"  {program.name}: {number} loops of unknown length are counted once"
        if program.costs is not None and program.costs.unknown_kernels:
            number = len(program.costs.unknown_kernels)
            yield f"  {program.name}: {number} kernels of which no FLOPs are known"


def _verdict(phase: PhasePlan, remedy: Remedy | None) -> str:
    if phase.fits:
        return "fits" if phase.limit_bytes is not None else "compiles; memory has no stated limit"
    if remedy is None:
        return "does not fit"
    if remedy.change is None:
        return (
            f"does not fit, and nothing that was tried would ({remedy.num_compiled} compilations): "
            "use more or larger devices, model.param_dtype or optimizer.moments of fewer bits, "
            "model.lora, or shorter rows"
        )
    assert remedy.needed_bytes is not None
    return f"does not fit, and this would: {remedy.words} ({remedy.needed_bytes / GIB:.2f} GiB)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
