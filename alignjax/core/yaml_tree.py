"""YAML text and `key=value` overrides -> plain values, each with the place it came from.

The dialect is YAML 1.2's core schema, without its surprises of old: `1e-4` is a number, `no` is
text, `010` is ten, a date is text. Duplicate keys, tags and aliases are errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from alignjax.core.errors import UserError

Key = tuple[str | int, ...]
"""The way from the root to a value: ("phases", 0, "optimizer", "learning_rate")."""


class Origin(NamedTuple):
    """Where a value was written."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


COMMAND_LINE = Origin("command line")


@dataclass
class Tree:
    """What a file and the command line say together.

    Attributes:
      values: dicts with text keys, lists, text, numbers, bools and None.
      origins: the place of every dict, list and leaf in `values`, the root included.
    """

    values: dict[str, Any]
    origins: dict[Key, Origin] = field(default_factory=dict)

    def origin(self, key: Key) -> Origin:
        """The place of the value, or of the nearest section around it that was written."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins[key]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """Reads a YAML file and applies overrides such as `optimizer.learning_rate=1e-4` in order.

    Raises:
      UserError: no such file, not valid YAML, or not an override; names the file and the line.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.start} is {error.reason}") from None
    return loads(text, overrides, name=str(path))


def loads(text: str, overrides: Iterable[str] = (), *, name: str = "<text>") -> Tree:
    """Like `load`, for text; `name` stands for the file in messages."""
    tree = Tree({}, {(): Origin(name)})
    node = _compose(text, name)
    if node is not None and node.tag != _NULL:
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{name}:{_line(node)}: expected lines of `key: value` at the top")
        tree.values = _convert(node, (), name, tree.origins)
        tree.origins[()] = Origin(name)
    for override in overrides:
        _override(tree, override)
    return tree


def _override(tree: Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        raise UserError(
            f"command line: {override!r} is not an override; write key=value, as in "
            "optimizer.learning_rate=1e-4"
        )
    try:
        node = _compose(text, str(COMMAND_LINE))
        origins: dict[Key, Origin] = {}
        value = None if node is None else _convert(node, (), str(COMMAND_LINE), origins)
    except UserError as error:
        raise UserError(f"{error} (in {override!r}; quote text with special signs)") from None

    here: Any = tree.values
    key: Key = ()
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        step: str | int = part
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise UserError(
                    f"command line: {override!r}: {dotted(key)} is a list of {len(here)}; "
                    f"expected a number below that, got {part!r}"
                )
            step = int(part)
        key = (*key, step)
        if is_last:
            here[step] = value
        elif isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
            tree.origins[key] = COMMAND_LINE
        if not is_last and not isinstance(here[step], dict | list):
            raise UserError(
                f"command line: {override!r}: {dotted(key)} is {here[step]!r} "
                f"({tree.origin(key)}), not a section"
            )
        here = here[step]
    for old in [k for k in tree.origins if k[: len(key)] == key]:
        del tree.origins[old]
    tree.origins[key] = COMMAND_LINE
    tree.origins.update({key + below: COMMAND_LINE for below in origins})


def dotted(key: Key) -> str:
    """("optimizer", "betas", 0) -> "optimizer.betas.0"."""
    return ".".join(map(str, key))


_PREFIX = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (_PREFIX + t for t in ("null", "bool", "int", "float", "str"))
_DIGITS = "[0-9]+(?:_[0-9]+)*"  # 1_000_000
_IMPLICIT = {
    _NULL: (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    _BOOL: (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    _INT: (rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    _FLOAT: (
        rf"[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """Only composes; the tags of plain scalars are those of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not supported; write the value out",
                event.start_mark,
            )  # fmt: skip
        return super().compose_node(parent, index)


for _tag, (_pattern, _first) in _IMPLICIT.items():
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Origin(name, mark.line + 1 if mark and name != str(COMMAND_LINE) else None)
        what = " ".join(f"{error.context or ''} {error.problem}".split())
        raise UserError(f"{where}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{name}:{line}: not valid YAML: character U+{error.character:04X} is not allowed"
        ) from None


def _convert(node: yaml.Node, key: Key, name: str, origins: dict[Key, Origin]) -> Any:
    origins[key] = Origin(name, _line(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        return dict(_items(node, key, name, origins))
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        return [_convert(n, (*key, i), name, origins) for i, n in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag in (*_IMPLICIT, _STR):
        if node.tag == _STR or re.fullmatch(_IMPLICIT[node.tag][0], node.value):
            return _scalar(node.tag, node.value)
        raise UserError(f"{origins[key]}: {node.value!r} is not of type {node.tag.split(':')[-1]}")
    raise UserError(f"{origins[key]}: the tag {node.tag!r} is not supported")


def _items(
    node: yaml.MappingNode, key: Key, name: str, origins: dict[Key, Origin]
) -> Iterator[tuple[str, Any]]:
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{name}:{_line(key_node)}: a key must be text, not a list or section")
        text, line = key_node.value, _line(key_node)
        if text in lines:
            raise UserError(
                f"{name}:{line}: key {dotted((*key, text))!r} was given in line {lines[text]}"
            )
        lines[text] = line
        yield text, _convert(value_node, (*key, text), name, origins)
        origins[*key, text] = Origin(name, line)  # a section's line is that of its key


def _scalar(tag: str, text: str) -> Any:
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    if tag == _INT:
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if tag == _FLOAT:
        return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    return text


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*(?: [\w./-]+)*")
_RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def scalar_text(value: Any) -> str:
    """A leaf as YAML on one line, the same to a reader of YAML 1.1 and of 1.2."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        if text.strip("-") in ("inf", "nan"):
            return text.replace("inf", ".inf").replace("nan", ".nan")
        mantissa, e, exponent = text.partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + e + exponent
    if isinstance(value, int):
        return str(value)
    if _PLAIN.fullmatch(value) and value.isascii() and value.lower() not in _RESERVED:
        return value
    return quoted(value)


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.2 would not take for text, `1e-4`; as one of 1.1 would not."""

    yaml_implicit_resolvers = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *_Loader.yaml_implicit_resolvers.get(first, ()),
        ]
        for first in (*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers)
    }


# PyYAML leaves some line ends, such as U+0085, bare where they are then read as a space.
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(_STR, text, None if text.isprintable() else '"'),
)


def dump(values: dict[str, Any]) -> str:
    """Plain values -> YAML that `load`, and a reader of YAML 1.1, read back as they were."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def quoted(text: str) -> str:
    """Text between double quotes, with YAML's escapes where they are needed."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}

    def escape(char: str) -> str:
        if char in escapes:
            return escapes[char]
        if char.isprintable():
            return char
        code = ord(char)
        return f"\\x{code:02x}" if code < 256 else f"\\U{code:08x}"

    return '"' + "".join(map(escape, text)) + '"'
