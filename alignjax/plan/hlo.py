"""HLO text of a compiled program -> FLOPs, bytes of memory and collectives of one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from alignjax.plan.hlo_collectives import Collective, collective, is_collective
from alignjax.plan.hlo_flops import UNKNOWN, flops
from alignjax.plan.hlo_loops import trips
from alignjax.plan.hlo_memory import traffic
from alignjax.plan.hlo_text import Computation, Instruction, Module, parse

__all__ = ["Collective", "Costs", "count"]


@dataclass
class Costs:
    """What one device does in one call of a program."""

    flops: float = 0.0
    """Of matrix products, convolutions and kernels; two for each multiplication and addition."""
    bytes: float = 0.0
    """Read from and written to the device's memory."""
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)
    """Loops of which nothing says how often they turn: counted `unknown_trips` times."""
    unknown_kernels: list[str] = field(default_factory=list)
    """Custom calls on floats of which nothing says what they compute: no FLOPs counted."""

    def add(self, other: Costs, times: float = 1) -> None:
        """Adds `times` another one."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.collectives += [
            dataclasses.replace(each, times=each.times * times) for each in other.collectives
        ]
        self.unknown_loops += other.unknown_loops
        self.unknown_kernels += other.unknown_kernels


def count(
    text: str,
    *,
    devices_per_slice: int | None = None,
    coords: Sequence[Sequence[int]] | None = None,
    unknown_trips: float = 1,
) -> Costs:
    """The costs of one device in one call.

    A loop's body counts as often as it turns, of the branches of a conditional the dearest counts.
    FLOPs are those of products and convolutions, wherever they are, and of kernels (see
    `hlo_flops`). Bytes are the operands and results of what stands outside of fusions, in the
    device's main memory (see `hlo_memory`). A collective that was split into a start and a done
    counts once.

    Args:
      text: `compiled.as_text()`: optimised HLO of a CPU, TPU or GPU, after partitioning.
      devices_per_slice: devices that reach each other without the network between slices, in the
        order of the mesh; None: all. TPU programs of several slices say themselves what crosses.
      coords: where each device is in the torus, in the order of the mesh. Without it collectives
        say nothing of the links that they can use.
      unknown_trips: how often a loop turns of which nothing says it (see `hlo_loops.trips`).
    Raises:
      ValueError: if the text is not such HLO.
    """
    module = parse(text)
    counter = _Counter(module, devices_per_slice, coords, unknown_trips)
    return counter.outside(module.computations[module.entry])


@dataclass
class _Counter:
    module: Module
    devices_per_slice: int | None
    coords: Sequence[Sequence[int]] | None
    unknown_trips: float
    known: dict[str, Costs] = field(default_factory=dict)

    def outside(self, computation: Computation) -> Costs:
        """Of a computation whose instructions run one by one."""
        if computation.name not in self.known:
            costs = Costs()
            for each in computation.instructions.values():
                self._one(costs, computation, each)
            self.known[computation.name] = costs
        return self.known[computation.name]

    def _one(self, costs: Costs, computation: Computation, each: Instruction) -> None:
        if each.opcode == "while":
            number = trips(self.module, computation, each)
            if number is None:
                costs.unknown_loops.append(each.name)
                number = self.unknown_trips
            costs.add(self.outside(self._called(each, "body")), number)
        elif each.opcode == "conditional":
            branches = [self.outside(branch) for branch in self._branches(each)]
            costs.add(max(branches, key=lambda branch: (branch.flops, branch.bytes)))
        elif each.opcode == "call":
            costs.add(self.outside(self._called(each, "to_apply")))
        elif each.opcode == "async-start":
            costs.add(self.outside(self._called(each, "calls")))
        else:
            costs.bytes += traffic(self.module, computation, each)
            self._work(costs, computation, each)

    def _work(self, costs: Costs, computation: Computation, each: Instruction) -> None:
        """FLOPs and collectives of an instruction, and of those inside of a fusion."""
        if each.opcode == "fusion":
            inner = self._called(each, "calls")
            for instruction in inner.instructions.values():
                self._work(costs, inner, instruction)
        elif is_collective(computation, each):
            costs.collectives.append(
                collective(self.module, computation, each, self.devices_per_slice, self.coords)
            )
        elif (number := flops(computation, each)) == UNKNOWN:
            costs.unknown_kernels.append(each.name)
        else:
            costs.flops += number

    def _called(self, each: Instruction, attribute: str) -> Computation:
        return self.module.computations[each.called(attribute) or ""]

    def _branches(self, each: Instruction) -> list[Computation]:
        several = each.attribute(r"branch_computations=\{([^}]*)\}")
        if several:
            names = [name.strip().lstrip("%") for name in several.split(",")]
            return [self.module.computations[name] for name in names]
        return [self._called(each, f"{name}_computation") for name in ("true", "false")]
