"""An instruction of HLO -> bytes that it reads from and writes to the device's main memory."""

from __future__ import annotations

from alignjax.plan.hlo_collectives import KINDS, is_collective
from alignjax.plan.hlo_text import Buffer, Computation, Instruction, Module

_MAIN = 0
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "add-dependency", "domain", "opt-barrier", "optimization-barrier", "recv",
    "infeed", "outfeed", "rng-get-and-update-state",
)  # fmt: skip
"""Opcodes that move nothing."""
_FREE_CALLS = (
    "AllocateBuffer", "ConcatBitcast", "SliceId", "AsyncCollectiveDone", "AsyncCollectiveStart",
    "AssumeGatherIndicesInBound",
)  # fmt: skip
_WINDOWS = ("dynamic-slice", "slice", "gather")
"""They read as much of their first operand as they give out."""
_SAME = ("bitcast", "reshape")
"""Other names for what they are made of, inside of a fusion."""


def traffic(module: Module, computation: Computation, each: Instruction) -> float:
    """Bytes of an instruction that stands outside of fusions; without those of what it calls.

    Operands once and results once. What is left in another memory (VMEM, where TPU programs keep
    what is used again soon) costs nothing. Of what is sliced or gathered from, the part; of what is
    updated in place, the update. Padding of layouts is not counted, nor what a kernel reads twice.
    """
    opcode = each.opcode.removesuffix("-start")
    target = each.attribute(r'custom_call_target="([^"]*)"') if opcode == "custom-call" else None
    if opcode in _FREE or opcode.endswith(("-done", "-update")) or target in _FREE_CALLS:
        return 0.0
    operands = [computation.instructions[name] for name in each.operands]
    if opcode == "fusion":
        inner = module.computations[each.called("calls") or ""]
        read = sum(
            _main(operand.shape, _read(module, inner, parameter))
            for operand, parameter in zip(operands, inner.parameters, strict=True)
        )
        return read + _written(module, inner, inner.root, each.shape)
    result = _result(each)
    written = sum(_main((buffer,), buffer.bytes) for buffer in result)
    if opcode in _WINDOWS:
        part = sum(buffer.bytes for buffer in result)
        read = sum(_main(operand.shape, operand.bytes) for operand in operands[1:])
        return read + _main(operands[0].shape, part) + written
    if opcode in ("dynamic-update-slice", "scatter"):
        updates = (
            operands[1:2] if opcode == "dynamic-update-slice" else operands[-len(each.shape) :]
        )
        size = sum(update.bytes for update in updates)
        kept = size * (opcode == "scatter")  # It combines the updates with what was there.
        read = sum(_main(operand.shape, operand.bytes) for operand in operands[len(each.shape) :])
        return read + _main(operands[0].shape, kept) + _main(each.shape, size)
    return written + sum(_main(operand.shape, operand.bytes) for operand in operands)


def _main(shape: tuple[Buffer, ...], size: float) -> float:
    """`size` where the array lies in main memory, else 0."""
    return size if shape and shape[0].space == _MAIN else 0.0


def _result(each: Instruction) -> tuple[Buffer, ...]:
    """The arrays that are made, without what else a start names: operands and context."""
    if each.opcode == "send":
        return ()
    if each.opcode == "copy-start":
        return each.elements[0]
    if each.opcode.endswith("-start") and each.opcode != "all-reduce-start":
        return each.elements[1]
    return each.shape


def _read(module: Module, inner: Computation, value: Instruction) -> float:
    """Bytes of a parameter of a fusion, or of another name of it, that the fusion reads."""
    read = value.bytes if value.is_root else 0.0
    for user in inner.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode in _WINDOWS and first:
            read += sum(buffer.bytes for buffer in user.shape)
        elif (
            (user.opcode == "dynamic-update-slice" and first)
            or user.opcode == "tuple"
            or (user.opcode == "custom-call" and "AsyncCollective" in user.attributes)
            or (user.opcode in KINDS and not is_collective(inner, user))
        ):
            continue
        elif user.opcode in _SAME:
            read += _read(module, inner, user)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls") or ""]
            for parameter, name in zip(nested.parameters, user.operands, strict=True):
                if name == value.name:
                    is_same = _source(nested, nested.root) is parameter
                    read += _read(module, *((inner, user) if is_same else (nested, parameter)))
        else:
            return value.bytes
    return min(read, value.bytes)


def _source(computation: Computation, value: Instruction) -> Instruction:
    """What a value is another name of."""
    while value.opcode in _SAME:
        value = computation.instructions[value.operands[0]]
    return value


def _written(
    module: Module, inner: Computation, value: Instruction, shape: tuple[Buffer, ...]
) -> float:
    """Bytes that a fusion writes to make `value`, which goes to where `shape` says."""
    if value.opcode == "tuple":
        written, start = 0.0, 0
        for name in value.operands:
            part = inner.instructions[name]
            leaves = shape[start : start + len(part.shape)]
            written += _written(module, inner, part, leaves)
            start += len(part.shape)
        return written
    if value.opcode == "parameter" or (value.opcode in KINDS and not is_collective(inner, value)):
        return 0.0
    source = _source(inner, value)
    if source.opcode == "dynamic-update-slice":
        return _main(shape, inner.instructions[source.operands[1]].bytes)
    if value.opcode == "custom-call" and "AsyncCollective" in value.attributes:
        made = [inner.instructions[name] for name in value.operands]
        made = [each for each in made if each.opcode in KINDS and is_collective(inner, each)]
        return sum(_main(each.shape, each.bytes) for each in made)
    if value.opcode == "fusion":
        nested = module.computations[value.called("calls") or ""]
        return _written(module, nested, nested.root, shape)
    return sum(_main((buffer,), buffer.bytes) for buffer in shape)
