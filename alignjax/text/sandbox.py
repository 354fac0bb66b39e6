"""Source of a chat template -> a compiled one that can neither reach the machine nor run on.

jinja2's sandbox keeps a template away from attributes and from changing what it is given, but lets
loops within loops, recursive macros and `10 ** 10 ** 10` run until the machine gives up. Here each
turn of a loop and each call is counted, and what would grow without bound is refused. A template
that only wants to waste memory can still take some, as much as one value has; MemoryError is caught
like any other fault of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 300_000
"""Turns of loops and calls in one rendering, all together: a second or two."""
MAX_SIZE = 20_000_000
"""Characters or items of one value that a template makes."""


class TemplateLimitError(jinja2.TemplateError):
    """A template does more than a template has to."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Blocks trimmed, the functions that templates on the Hub call, and limits.

    `start` begins a count for the thread that calls it: rendering is not shared between threads.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        del self.globals["lipsum"]  # Makes text of any length.
        self._count = threading.local()
        self.filters["tojson"] = _to_json
        self.filters[_COUNTED] = self._counted
        self.filters[_SIZED] = _sized
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def start(self) -> None:
        """Sets the count back; to be called before each rendering."""
        self._count.steps = 0

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._step()
        is_text = isinstance(getattr(__obj, "__self__", None), str)
        for value in (*args, *kwargs.values()):
            _sized(value)
            if is_text and isinstance(value, int) and value > MAX_SIZE:  # 'x'.ljust(10 ** 10)
                raise TemplateLimitError(f"a text of {value:,} characters")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = {"*": _product_size, "**": _power_size, "%": _format_size}.get(operator)
        if size is not None and size(left, right) > MAX_SIZE:
            raise TemplateLimitError(f"{operator!r} makes a value that is too large")
        return _sized(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        for assign in tree.find_all(nodes.Assign):
            value = assign.node
            assign.node = nodes.Filter(value, _SIZED, [], [], None, None, lineno=assign.lineno)
        return tree

    def _counted(self, values: Iterable[Any]) -> Iterable[Any]:
        # A list, so that loop.length and loop.last look no further than they did.
        values = values if isinstance(values, list | tuple) else list(_few(values))
        for _ in values:
            self._step()
        return values

    def _step(self) -> None:
        self._count.steps += 1
        if self._count.steps > MAX_STEPS:
            raise TemplateLimitError(f"more than {MAX_STEPS:,} turns of loops and calls")


_COUNTED, _SIZED = "alignjax counted", "alignjax sized"
"""Names of filters that no template can write."""


def _few(values: Iterable[Any]) -> Iterator[Any]:
    for n, value in enumerate(values):
        if n >= MAX_STEPS:
            raise TemplateLimitError(f"more than {MAX_STEPS:,} turns of a loop")
        yield value


def _sized(value: Any) -> Any:
    if isinstance(value, str | bytes | list | tuple | dict) and len(value) > MAX_SIZE:
        raise TemplateLimitError(f"a value of {len(value):,} characters or items")
    return value


def _product_size(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
            return len(value) * count
    return 0


def _power_size(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * max(right, 0)
    return 0


def _format_size(left: Any, right: Any) -> int:
    """The largest width that a format of this kind asks for; a star asks for an argument's."""
    if not isinstance(left, str | bytes):
        return 0
    text = left if isinstance(left, str) else left.decode("latin-1")
    digits = "".join(c if c.isdecimal() else " " for c in text).split()
    return max((int(d[:20]) for d in digits), default=0) if "*" not in text else MAX_SIZE + 1


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # No escaping of HTML.


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: renders its body; the mask needs no mark."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
