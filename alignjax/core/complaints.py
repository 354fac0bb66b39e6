"""What pydantic found wrong in a tree -> one readable line for each fault, with its place."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Union

from pydantic import BaseModel, ValidationError

from alignjax.core.errors import KeyedError
from alignjax.core.yaml_tree import Key, Origin, Tree, dotted, scalar_text


def complaints(schema: type[BaseModel], tree: Tree, error: ValidationError) -> list[str]:
    """One line for each fault, in the order of the file; those of the command line are last."""
    lines: list[tuple[Origin, str]] = []
    expected: dict[Key, list[str]] = {}  # several where a key's type is a union
    for fault in error.errors(include_url=False):
        key, kind, context = _key(fault, tree), fault["type"], fault.get("ctx", {})
        if kind.startswith("union_tag"):
            key = (*key, context["discriminator"].strip("'"))
        if kind == "extra_forbidden":
            lines.append((tree.origin(key), _unknown_key(schema, key)))
        elif kind == "missing" and isinstance(key[-1], int):
            values = _lookup(tree.values, key[:-1])
            what = f"{dotted(key[:-1])}: expected more values, got {_kind(values)}"
            lines.append((tree.origin(key), what))
        elif kind in ("missing", "union_tag_not_found"):
            what = f"missing key {str(key[-1])!r}{_in_section(key[:-1])}"
            lines.append((tree.origin(key), what))
        elif kind in ("value_error", "assertion_error"):
            if isinstance(context["error"], KeyedError):
                key = (*key, *context["error"].key)
            what = f"{dotted(key)}: {context['error']}" if key else str(context["error"])
            lines.append((tree.origin(key), what))
        else:
            expected.setdefault(key, []).append(_expected(fault))
    for key, wanted in expected.items():
        what, value = " or ".join(dict.fromkeys(wanted)), _lookup(tree.values, key)
        hint = _did_you_mean(value, re.findall(r"'([^']*)'", what))
        what = f"{dotted(key)}: expected {what}, got {_kind(value)}{hint}"
        lines.append((tree.origin(key), what))
    lines.sort(key=lambda line: (line[0].line is None, line[0].line or 0))
    return [f"{origin}: {what}" for origin, what in lines]


def _key(fault: Mapping[str, Any], tree: Tree) -> Key:
    """Pydantic's location less the names of union branches and types, which no file has."""
    key: Key = ()
    here: Any = tree.values
    for part in fault["loc"]:
        is_there = (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if is_there:
            here = here[part]
            key = (*key, part)
    return (*key, fault["loc"][-1]) if fault["type"] == "missing" else key


def _lookup(values: Any, key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


def _in_section(section: Key) -> str:
    return f" in {dotted(section)}" if section else ""


_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of `key: value`",
    "model_type": "a section of `key: value`",
    "model_attributes_type": "a section of `key: value`",
    "none_required": "null",
}


def _expected(fault: Mapping[str, Any]) -> str:
    context = fault.get("ctx", {})
    if fault["type"] in ("literal_error", "enum"):
        return str(context["expected"])
    if fault["type"] == "union_tag_invalid":
        return str(context["expected_tags"]).replace(", ", " or ")
    if fault["type"] in _EXPECTED:
        return _EXPECTED[fault["type"]]
    message = re.sub(r"^\w+ should (be |have )?| after validation, not .*", "", fault["msg"])
    message = message[0].lower() + message[1:]
    return f"a number {message}" if message.startswith(("greater", "less")) else message


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return scalar_text(value)


def _unknown_key(schema: type[BaseModel], key: Key) -> str:
    *section, name = key
    fields = list(dict.fromkeys(f for s in _schemas(schema, tuple(section)) for f in _fields(s)))
    hint = _did_you_mean(name, fields)
    if not hint:
        elsewhere = [_place(k) for k in _all_keys(schema) if k[-1] == name]
        if elsewhere:
            hint = f"; did you mean {' or '.join(elsewhere[:3])}?"
        elif fields:
            hint = f"; expected one of {', '.join(fields)}"
    return f"unknown key {name!r}{_in_section(tuple(section))}{hint}"


def _place(key: Key) -> str:
    return repr(dotted(key)) + (" at the top level" if len(key) == 1 else "")


def _did_you_mean(word: Any, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# The schema, walked.


def _fields(schema: type[BaseModel]) -> dict[str, Any]:
    return {info.alias or name: info.annotation for name, info in schema.model_fields.items()}


def _parts(annotation: Any) -> Iterator[Any]:
    """The types that a union, a list, a dict or an Annotated may hold."""
    origin = typing.get_origin(annotation)
    if origin is None:
        yield annotation
    elif origin is typing.Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for arg in typing.get_args(annotation):
            yield from _parts(arg)
    else:
        yield annotation


def _below(annotation: Any, part: str | int) -> Iterator[Any]:
    """The types of the values under `part` of a value of the type."""
    for kind in _parts(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if part in _fields(kind):
                yield from _parts(_fields(kind)[str(part)])
        elif typing.get_origin(kind) is not None:
            for arg in typing.get_args(kind):
                yield from _parts(arg)


def _schemas(schema: type[BaseModel], section: Key) -> list[type[BaseModel]]:
    """The models that may stand at a section: several where it is a union."""
    kinds: list[Any] = [schema]
    for part in section:
        kinds = [below for kind in kinds for below in _below(kind, part)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _all_keys(schema: type[BaseModel], section: Key = ()) -> Iterator[Key]:
    for name in _fields(schema):
        key = (*section, name)
        yield key
        for below in _schemas(schema, (name,)) if len(key) < 8 else ():
            yield from _all_keys(below, key)
