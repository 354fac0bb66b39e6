"""An instruction of HLO that moves data between devices -> what it moves, and between which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignjax.plan.hlo_groups import groups
from alignjax.plan.hlo_text import Computation, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OTHER_NAMES = {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
_MEGASCALE = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    kind: str
    """One of KINDS."""
    bytes: float
    """Of the whole array that the group holds together after an all-gather or before a
    reduce-scatter, of the array of each device else."""
    group_size: int
    """Devices that take part together."""
    crosses_slices: bool = False
    times: float = 1
    """How often a call of the program does it."""
    num_slices: int = 1
    """Slices that the devices of a group lie in."""
    spans: tuple[tuple[int, int], ...] = ()
    """Of each axis of the torus along which they lie: how many places they take, of how many that
    the slice has. Empty where that is not known."""


def is_collective(computation: Computation, each: Instruction) -> bool:
    """Whether data moves between devices here: at its start, where start and done are two.

    A fusion that continues or ends a collective repeats it, with the identifier of the chain.
    """
    if each.opcode == "send":
        return "_xla_megascale_transfer_type" in each.attributes
    kind = each.opcode.removesuffix("-start")
    if kind not in KINDS and kind not in _OTHER_NAMES:
        return False
    targets = (other.attributes for other in computation.instructions.values())
    is_chain = each.attribute(r'\bchain_id="(\w+)"') is not None
    return not is_chain or any('"AsyncCollectiveStart"' in target for target in targets)


def collective(
    module: Module,
    computation: Computation,
    each: Instruction,
    devices_per_slice: int | None,
    coords: Sequence[Sequence[int]] | None,
) -> Collective:
    """What an instruction of which `is_collective` holds moves.

    Raises:
      ValueError: on groups that are written in a way unknown here.
    """
    operands = [computation.instructions[name] for name in each.operands]
    if each.opcode == "send":
        return _between_slices(operands[0].bytes, each)
    kind = each.opcode.removesuffix("-start")
    kind = _OTHER_NAMES.get(kind, kind)
    size = sum(operand.bytes for operand in operands)
    members = groups(each.attributes, module.num_devices)
    group = max(members, key=len)
    if kind == "all-gather":
        size *= len(group)
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
        kind = "reduce-scatter"  # TPU: a fusion of an all-reduce and the slice that is wanted.
    slices = 1
    if devices_per_slice:
        slices = max(len({device // devices_per_slice for device in one}) for one in members)
    spans = () if coords is None else _spans([coords[device] for device in group], coords)
    return Collective(kind, size, len(group), slices > 1, 1, slices, spans)


def _between_slices(size: float, each: Instruction) -> Collective:
    """A transfer that the host hands to the network: `{1,2}x{0:15}` are its slices and devices."""
    name = each.attribute(r'_xla_megascale_transfer_type="(\w+)"') or ""
    target = each.attribute(r'_xla_megascale_target="\{([^}]*)\}') or ""
    if name not in _MEGASCALE:
        raise ValueError(f"{each.name}: a transfer between slices of the unknown type {name!r}")
    slices = sum(_length(part) for part in target.split(",") if part) or 2
    kind = _MEGASCALE[name]
    size *= slices if kind == "all-gather" else 1
    return Collective(kind, size, slices, crosses_slices=True, num_slices=slices)


def _length(part: str) -> int:
    """Of `3` or `1:4`, which includes its end."""
    first, _, last = part.partition(":")
    return int(last) - int(first) + 1 if last else 1


def _spans(
    group: Sequence[Sequence[int]], everyone: Sequence[Sequence[int]]
) -> tuple[tuple[int, int], ...]:
    """Of each axis of the torus along which they differ: places taken by the group, by everyone."""
    places = [
        (len(set(own)), len(set(every)))
        for own, every in zip(zip(*group, strict=True), zip(*everyone, strict=True), strict=True)
    ]
    return tuple((own, every) for own, every in places if own > 1)
