"""The text of an optimised HLO module -> its computations, instructions and the shapes of both."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
    "c64": 64, "c128": 128,
}  # fmt: skip
_HEAD = re.compile(r"^(?:(ENTRY)\s+)?%?([\w.\-]+)\s+\(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = (.*)$", re.DOTALL)
_ARRAY = re.compile(r"^(\w+)\[([\d,<=? ]*)\](?:\{(.*)\})?$", re.DOTALL)
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Buffer:
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    """The memory that it lies in: 0 the device's main memory, on TPUs 1 VMEM, 5 the host's."""

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without what the layout pads."""
        return self.size * _bits(self.dtype) / 8

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf", "c"))


@dataclass
class Instruction:
    name: str
    shape: tuple[Buffer, ...]
    """The leaves, of a tuple in order; empty for an empty tuple."""
    opcode: str
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    literal: str
    """What stands in the parentheses: the value of a constant, the number of a parameter."""
    attributes: str
    """All that follows."""
    is_root: bool = False
    elements: tuple[tuple[Buffer, ...], ...] = ()
    """The leaves of each element of a tuple."""

    def attribute(self, pattern: str) -> str | None:
        """The first group of the first match of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes, re.DOTALL)
        return found.group(1) if found else None

    def called(self, name: str) -> str | None:
        """The computation of an attribute such as calls, body or condition."""
        return self.attribute(rf"\b{name}=%?([\w.\-]+)")

    @property
    def bytes(self) -> float:
        return sum(buffer.bytes for buffer in self.shape)


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    """In the order of the text: operands come before their users."""

    @cached_property
    def root(self) -> Instruction:
        return next(each for each in self.instructions.values() if each.is_root)

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.literal))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for operand in dict.fromkeys(each.operands):
                found[operand].append(each)
        return found


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: str
    num_devices: int
    """Partitions times replicas: devices that run it together."""


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`.

    Raises:
      ValueError: with the line, where it is not HLO text.
    """
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, ""
    header = text.split("\n", 1)[0]

    def finish() -> None:
        nonlocal pending
        if pending and current is not None:
            instruction = _instruction(pending)
            current.instructions[instruction.name] = instruction
        pending = ""

    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head.group(2)] = Computation(head.group(2))
                entry = head.group(2) if head.group(1) else entry
        elif line.rstrip() == "}" or line.startswith("}, execution_thread"):
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            pending = line
        else:  # Some attributes hold line breaks.
            pending += "\n" + line
    if not entry:
        raise ValueError("no ENTRY computation: expected the HLO text of a compiled program")
    sizes = (re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count"))
    return Module(computations, entry, prod(int(size.group(1)) for size in sizes if size))


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if not found:
        raise ValueError(f"not an HLO instruction: {line[:200]!r}")
    is_root, name, rest = bool(found.group(1)), found.group(2), found.group(3)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = _COMMENT.sub("", rest[:end]), rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside, attributes = _COMMENT.sub("", rest[len(opcode) + 1 : end]), rest[end + 1 :]
    is_leaf = opcode in ("constant", "parameter", "iota", "partition-id", "replica-id")
    operands = () if is_leaf else tuple(_name(part) for part in _split(inside))
    elements = tuple(_leaves(part) for part in _split(shape[1:-1])) if shape[0] == "(" else ()
    return Instruction(
        name, _leaves(shape), opcode, operands, inside.strip(), attributes, is_root, elements
    )


def _name(operand: str) -> str:
    return operand.split()[-1].lstrip("%")


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis is not closed: {text[:200]!r}")


def _split(text: str) -> list[str]:
    """At the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _leaves(shape: str) -> tuple[Buffer, ...]:
    if shape.startswith("("):
        return tuple(leaf for part in _split(shape[1:-1]) for leaf in _leaves(part))
    if shape.endswith("[]") or shape in ("token[]", "opaque[]"):
        return (Buffer(shape[:-2], ()),)
    found = _ARRAY.match(shape)
    if not found:
        raise ValueError(f"not an HLO shape: {shape!r}")
    dtype, dims, layout = found.groups()
    space = _SPACE.search(layout or "")
    sizes = tuple(int(size.strip(" <=?")) for size in dims.split(",") if size)
    _bits(dtype)
    return (Buffer(dtype, sizes, int(space.group(1)) if space else 0),)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"^[usf](\d+)", dtype)
    if not found:
        raise ValueError(f"{dtype!r} is no type of an HLO array that is known here")
    return int(found.group(1))
