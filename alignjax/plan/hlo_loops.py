"""A while loop of HLO -> how often it turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from alignjax.plan.hlo_text import Computation, Instruction, Module

_COPIES = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "broadcast")
_SWAPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}

Value = int | str | None
"""A number; "element3" of the tuple that the loop carries; "parameter3" of a fused computation;
None: nothing that is known."""


class _Test(NamedTuple):
    """`left` DIRECTION `right` must hold for the loop to go on."""

    direction: str
    left: Value
    right: Value


def trips(module: Module, caller: Computation, loop: Instruction) -> float | None:
    """How often the body of `loop`, an instruction of `caller`, runs; None if nothing says so.

    In this order: the trip count that the compiler noted; a counter that starts at a constant, to
    which the body adds a constant, and that the condition compares with one, alone or together with
    other conditions, which may end the loop sooner; what `alignjax.core.loops.turning` named.
    """
    noted = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if noted:
        return int(noted)
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    counter = _Counter(module, caller, loop, body)
    tests = _tests(module, condition, condition.root)
    found = [number for test in tests if (number := counter.trips(test)) is not None]
    if found:
        return min(found)
    named = loop.attribute(r'op_name="[^"]*\bturning_([\d.]+)_times[^"/]*/while"')
    return float(named) if named else None


def _tests(module: Module, computation: Computation, value: Instruction) -> list[_Test]:
    """The comparisons of which all must hold."""
    if value.opcode == "compare":
        left, right = (_value(computation, name) for name in value.operands)
        return [_Test(value.attribute(r"direction=(\w+)") or "", left, right)]
    if value.opcode in ("fusion", "call"):
        inner = module.computations[value.called("calls") or value.called("to_apply") or ""]
        outer = [_value(computation, name) for name in value.operands]
        return [
            _Test(test.direction, _outside(test.left, outer), _outside(test.right, outer))
            for test in _tests(module, inner, inner.root)
        ]
    if value.opcode == "and" or value.opcode in _COPIES:
        operands = (computation.instructions[name] for name in value.operands)
        return [test for each in operands for test in _tests(module, computation, each)]
    return []


def _outside(value: Value, outer: Sequence[Value]) -> Value:
    """What the parameter of a fused computation is where that is called."""
    found = re.fullmatch(r"parameter(\d+)", value) if isinstance(value, str) else None
    return outer[int(found.group(1))] if found and outer else value


def _value(computation: Computation, name: str) -> Value:
    value = computation.instructions[name]
    if value.opcode == "constant":
        return int(value.literal) if re.fullmatch(r"-?\d+", value.literal) else None
    if value.opcode == "parameter":
        return f"parameter{value.literal}"
    if value.opcode == "get-tuple-element":
        is_carried = computation.instructions[value.operands[0]].opcode == "parameter"
        index = value.attribute(r"\bindex=(\d+)")
        return f"element{index}" if is_carried else None
    return _value(computation, value.operands[0]) if value.opcode in _COPIES else None


def _number(value: Value) -> int | None:
    """Of an element of the tuple."""
    found = re.fullmatch(r"element(\d+)", value) if isinstance(value, str) else None
    return int(found.group(1)) if found else None


class _Counter(NamedTuple):
    """A loop, to ask what its elements start at and what is added to them."""

    module: Module
    caller: Computation
    loop: Instruction
    body: Computation

    def trips(self, test: _Test) -> int | None:
        """How many a comparison allows."""
        for direction, counter, limit in (
            (test.direction, test.left, test.right),
            (_SWAPPED.get(test.direction, ""), test.right, test.left),
        ):
            step, first, last = self.step(counter), self.first(counter), self.constant(limit)
            if not step or first is None or last is None:
                continue
            span = (last - first) * (1 if step > 0 else -1)
            if direction in (("LE",) if step > 0 else ("GE",)):
                span += 1
            elif direction not in ("NE", "LT" if step > 0 else "GT"):
                continue
            return max(ceil(span / abs(step)), 0)
        return None

    def first(self, value: Value) -> int | None:
        """What an element is when the loop is entered, if that is a constant."""
        start = self.caller.instructions[self.loop.operands[0]]
        number = _number(value)
        if number is None or start.opcode != "tuple":
            return None
        found = _value(self.caller, start.operands[number])
        return found if isinstance(found, int) else None

    def constant(self, value: Value) -> int | None:
        """A number, or an element that starts as one and stays it."""
        if isinstance(value, int):
            return value
        return self.first(value) if self.step(value) == 0 else None

    def step(self, value: Value) -> int | None:
        """What the body adds to an element; 0 if it hands it on."""
        number = _number(value)
        if number is None or self.body.root.opcode != "tuple":
            return None
        return self.added(self.body, self.body.root.operands[number], f"element{number}")

    def added(
        self, computation: Computation, name: str, start: str, outer: Sequence[Value] = ()
    ) -> int | None:
        """What is added to `start` to make this value; `outer` are parameters of a fusion."""
        value = computation.instructions[name]
        if _outside(_value(computation, name), outer) == start:
            return 0
        operands = [_outside(_value(computation, each), outer) for each in value.operands]
        if value.opcode in _COPIES:
            return self.added(computation, value.operands[0], start, outer)
        if value.opcode in ("add", "subtract"):
            left, right = operands
            if right == start and value.opcode == "add":
                left, right = right, left
            number = self.constant(right) if left == start else None
            return -number if number is not None and value.opcode == "subtract" else number
        if value.opcode in ("fusion", "call"):
            inner = self.module.computations[
                value.called("calls") or value.called("to_apply") or ""
            ]
            return self.added(inner, inner.root.name, start, operands)
        return None
