"""Programs -> compiled: their memory, their costs and the time that they take at least."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from alignjax.plan import hlo, roofline
from alignjax.plan.chips import Chip
from alignjax.plan.memory import Memory, of_program, tree_bytes
from alignjax.plan.programs import Program, Programs

USABLE = 0.98
"""Share of a device's memory that a program may take: a TPU keeps the rest for itself."""
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_WHOLE = re.compile(r"Used ([\d.]+)([KMGT]?) of ")
"""How a compiler for TPUs says that a program does not fit: what it makes, or all that it holds."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Measured:
    """What the compiler made of a program, on each device.

    Attributes:
      trace_s, compile_s: seconds on the clock; compile_cpu_s: of all processors together, both.
      is_apart: devices run it that only sample.
      memory: while it runs; None where the compiler found no room for it.
      needed_bytes: what memory adds up to; without memory, what the compiler would have taken and
        what lies beside it.
      costs: of one device in one call; None without memory.
      time: of one call; None without memory, or for a chip that is not known.
    """

    name: str
    times: float
    trace_s: float
    compile_s: float
    compile_cpu_s: float
    needed_bytes: float
    memory: Memory | None = None
    costs: hlo.Costs | None = None
    time: roofline.Time | None = None
    utilisation: float | None = None
    """Work of the model (`plan.work`) over what the devices could do in the time; None: not asked
    for."""
    is_apart: bool = False

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.name,
            "times": self.times,
            "trace_s": round(self.trace_s, 2),
            "compile_s": round(self.compile_s, 2),
            "compile_cpu_s": round(self.compile_cpu_s, 2),
            "is_apart": self.is_apart,
            "needed_bytes": self.needed_bytes,
        }
        if self.memory is not None:
            found["memory"] = dict(self.memory.parts)
            found["argument_bytes"] = self.memory.argument_bytes
            found["compiler_argument_bytes"] = self.memory.compiler_argument_bytes
        if self.costs is not None:
            found |= {
                "flops": self.costs.flops,
                "bytes": self.costs.bytes,
                "collectives": _summed(self.costs.collectives),
                "unknown_loops": len(self.costs.unknown_loops),
                "unknown_kernels": len(self.costs.unknown_kernels),
            }
        if self.time is not None:
            found |= {**self.time._asdict(), "utilisation": self.utilisation}
        return found


@dataclass(frozen=True)
class PhasePlan:
    """What a phase needs and takes.

    Attributes:
      mesh: of the devices that train, or of all.
      sampling_mesh: of devices that only sample; None: all do both.
    """

    stage: str
    phase: str
    mesh: dict[str, int]
    programs: list[Measured]
    limit_bytes: float | None
    """What a device has for programs; None where nothing says that."""
    iteration_s: float | None
    """At least; None where a program does not fit."""
    num_tokens: float
    steps: int
    num_chips: float
    notes: list[str] = field(default_factory=list)
    sampling_mesh: dict[str, int] | None = None

    @property
    def needed_bytes(self) -> float:
        return max(program.needed_bytes for program in self.programs)

    @property
    def fits(self) -> bool:
        has_all = all(program.memory is not None for program in self.programs)
        return has_all and (self.limit_bytes is None or self.needed_bytes <= self.limit_bytes)

    @property
    def tokens_per_second(self) -> float | None:
        return self.num_tokens / self.iteration_s if self.iteration_s else None

    @property
    def chip_hours(self) -> float | None:
        """Of the run, without evaluations, checkpoints and what hosts do."""
        if self.iteration_s is None:
            return None
        return self.steps * self.iteration_s * self.num_chips / 3600

    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "phase": self.phase,
            "mesh": self.mesh,
            "sampling_mesh": self.sampling_mesh,
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "limit_bytes": self.limit_bytes,
            "iteration_s": self.iteration_s,
            "tokens_per_iteration": self.num_tokens,
            "tokens_per_s": self.tokens_per_second,
            "steps": self.steps,
            "chip_hours": self.chip_hours,
            "notes": self.notes,
            "programs": [program.as_json() for program in self.programs],
        }


def measure(program: Program, mesh: Mesh, chip: Chip | None) -> Measured:
    """Compiles a program, and looks at what came out.

    Args:
      mesh: of the devices that train.
      chip: what it is to run on; None: no time is estimated.
    Raises:
      RuntimeError: what the compiler says, unless that is that there is no room.
    """
    mesh = mesh if program.apart is None else program.apart
    started, began = time.process_time(), time.perf_counter()
    lowered = program.lower()
    traced = time.perf_counter()

    def measured(needed: float, *more: Any) -> Measured:
        seconds = traced - began, ended - traced, cpu_s
        is_apart = program.apart is not None
        return Measured(program.name, program.times, *seconds, needed, *more, is_apart=is_apart)

    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        ended, cpu_s = time.perf_counter(), time.process_time() - started
        return measured(needed_bytes(str(error), program))
    ended, cpu_s = time.perf_counter(), time.process_time() - started
    memory = of_program(program, lowered, compiled)
    coords = [getattr(device, "coords", None) for device in mesh.devices.flat]
    costs = hlo.count(compiled.as_text(), coords=None if None in coords else coords)  # type: ignore[arg-type]
    estimate = utilisation = None
    if chip is not None:
        estimate = roofline.estimate(costs, chip)
        if program.model_flops and estimate.seconds:
            possible = estimate.seconds * chip.bf16_flops * mesh.size
            utilisation = program.model_flops / possible
    return measured(memory.total, memory, costs, estimate, utilisation)


def needed_bytes(message: str, program: Program) -> float:
    """What a program would take that a compiler refused, with what lies beside it.

    Raises:
      RuntimeError: with the message, if it is about anything else.
    """
    if "RESOURCE_EXHAUSTED" in message:
        given = set(jax.tree.leaves(program.roles))
        sizes = {role: tree_bytes(tree) for role, tree in program.resident.items()}
        if found := _TEMPORARIES.search(message):
            return float(found[1]) * _UNITS[found[2]] + sum(sizes.values())
        if found := _WHOLE.search(message):
            beside = sum(size for role, size in sizes.items() if role not in given)
            return float(found[1]) * _UNITS[found[2]] + beside
    raise RuntimeError(message)


def plan_phase(
    stage: str,
    phase: str,
    programs: Programs,
    mesh: Mesh,
    chip: Chip | None,
    num_chips: float,
    say: Callable[[str], None],
) -> PhasePlan:
    """Compiles all programs of a phase, one after the other; `say` hears of each."""
    found = []
    for number, program in enumerate(programs.all, start=1):
        say(f"{stage}: compiling {program.name} ({number} of {len(programs.all)})")
        found.append(measure(program, mesh, chip))
    apart = next((program.apart for program in programs.all if program.apart is not None), None)
    return PhasePlan(
        stage,
        phase,
        _split(mesh),
        found,
        None if chip is None or not chip.hbm_bytes else USABLE * chip.hbm_bytes,
        iteration_s(found, is_ahead=programs.is_ahead),
        programs.num_tokens,
        programs.steps,
        num_chips,
        programs.notes,
        None if apart is None else _split(apart),
    )


def iteration_s(programs: Sequence[Measured], *, is_ahead: bool) -> float | None:
    """Seconds of an iteration at least: of all programs one after the other, or, ahead, of those of
    the kind of devices, those that sample or those that train, that takes longer.

    None: of one no time is known.
    """
    by_kind = {True: 0.0, False: 0.0}
    for one in programs:
        if one.time is None:
            return None
        by_kind[one.is_apart] += one.times * one.time.seconds
    return max(by_kind.values()) if is_ahead else sum(by_kind.values())


def _split(mesh: Mesh) -> dict[str, int]:
    """The axes of a mesh that split anything."""
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def _summed(collectives: list[hlo.Collective]) -> list[dict[str, Any]]:
    """By kind, size of group and network: how often, and how many bytes in all."""
    times: Counter[tuple[str, int, bool]] = Counter()
    total: Counter[tuple[str, int, bool]] = Counter()
    for each in collectives:
        key = each.kind, each.group_size, each.crosses_slices
        times[key] += each.times
        total[key] += each.times * each.bytes
    return [
        {"kind": kind, "group_size": size, "crosses_slices": crosses, "times": times[key],
         "bytes": total[key]}
        for key in sorted(total, key=lambda key: -total[key])
        for kind, size, crosses in [key]
    ]  # fmt: skip
