"""Which keys of a record mean what: record -> `Example`, every record checked before training."""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from pydantic import field_validator, model_validator

from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.data.sources import Record, Source

ROLES = ("system", "user", "assistant", "tool")


class Fields(Config):
    """Where in a record the parts of an example are.

    `prompt`, `completion` and `reference` are each the name of a key ("question") or, where they
    hold braces, a template over keys ("Question: {question}\\nAnswer:"; {{ and }} are braces).

    Attributes:
      prompt: what is given. Without one, the completion is a whole document.
      completion: what is trained in SFT. RL needs none.
      messages: key of a conversation, instead of prompt and completion.
      tools: key of a list of functions that the assistant may call, for the chat template.
      reference: what a reward function compares with. A key keeps its type; a template is text.
      reference_pattern: regular expression whose only group, at its last match, is the reference:
        "#### (.+)" for GSM8K.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    tools: str | None = None
    reference: str | None = None
    reference_pattern: str | None = None

    @field_validator("prompt", "completion", "reference")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None:
            _template_keys(value)
        return value

    @field_validator("reference_pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"expected one group (...), came {groups}")
        return value

    @model_validator(mode="after")
    def _is_example(self) -> Self:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("messages stands instead of prompt and completion; give either")
        if self.messages is None and self.prompt is None and self.completion is None:
            raise ValueError("give prompt, completion or messages: the keys that hold them")
        if self.reference_pattern is not None and self.reference is None:
            raise ValueError("reference_pattern needs reference: the key that it is applied to")
        return self

    @cached_property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Of each part that is set, the keys that it reads."""
        parts = {name: getattr(self, name) for name in ("prompt", "completion", "reference")}
        keys = {name: _template_keys(value) for name, value in parts.items() if value is not None}
        whole = {name: getattr(self, name) for name in ("messages", "tools")}
        return keys | {name: (key,) for name, key in whole.items() if key is not None}


@dataclass(frozen=True)
class Example:
    """One record, its parts by their meaning."""

    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    """What the assistant may call; None where the record names none."""
    reference: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """For rewards: the keys of the record that no other part reads. Never one by the name of an
    argument of theirs (prompt, completion, reference)."""


class Examples:
    """A source of `Example`; every record was read once, and found right, when it was made."""

    def __init__(self, source: Source, fields: Fields):
        """Checks all records.

        Raises:
          UserError: on the first that lacks a field or holds one of another type.
        """
        self._source, self._fields = source, fields
        for index in range(len(source)):
            self[index]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return make_example(self._source[index], self._fields, lambda: self.where(index))

    def where(self, index: int) -> str:
        return self._source.where(index)


def make_example(record: Record, fields: Fields, where: Any) -> Example:
    """Takes the parts of an example out of a record.

    Args:
      record: as it came from a source.
      fields: which keys mean what.
      where: called for the place that an error names.
    Raises:
      UserError: naming place, field, key, what was expected, what came and the keys there are.
    """

    def look_up(name: str, key: str) -> Any:
        if key in record:
            return record[key]
        near = difflib.get_close_matches(key, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        there = ", ".join(map(repr, record)) or "none"
        raise UserError(f"{where()}: {name}: no field {key!r}{hint} (fields there: {there})")

    def text(name: str, template: str) -> str:
        values = {}
        for key in fields.keys[name]:
            value = look_up(name, key)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UserError(
                    f"{where()}: {name}: field {key!r}: expected text or a number, "
                    f"came {kind(value)}"
                )
            values[key] = str(value)
        return _fill(template, values)

    used = {"prompt", "completion", "reference"}.union(*fields.keys.values())
    messages = reference = tools = None
    if fields.messages is not None:
        messages = look_up("messages", fields.messages)
        try:
            check_messages(messages, f"field {fields.messages!r}")
        except UserError as error:
            raise UserError(f"{where()}: {error}") from error
    if fields.tools is not None:
        tools = look_up("tools", fields.tools)
        if tools is not None and not isinstance(tools, list):
            raise UserError(
                f"{where()}: tools: field {fields.tools!r}: expected a list or null, "
                f"came {kind(tools)}"
            )
    if fields.reference is not None:
        if fields.reference_pattern is not None or "{" in fields.reference:
            reference = text("reference", fields.reference)
        else:
            reference = look_up("reference", fields.reference)
        if fields.reference_pattern is not None:
            found = re.findall(fields.reference_pattern, reference)
            if not found:
                raise UserError(
                    f"{where()}: reference: {fields.reference_pattern!r} matches nothing in "
                    f"{_shown(reference)}"
                )
            reference = found[-1].strip()
    return Example(
        prompt=None if fields.prompt is None else text("prompt", fields.prompt),
        completion=None if fields.completion is None else text("completion", fields.completion),
        messages=messages,
        tools=tools,
        reference=reference,
        fields={key: value for key, value in record.items() if key not in used},
    )


def check_messages(messages: Any, name: str) -> None:
    """Raises UserError, which begins with `name`, unless it is a list of chat messages."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: expected a list of messages, came {kind(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(
                f'{name}[{i}]: expected {{"role": ..., "content": ...}}, came {kind(message)}'
            )
        if message["role"] not in ROLES:
            raise UserError(
                f"{name}[{i}].role: expected one of {', '.join(ROLES)}, "
                f"came {_shown(message['role'])}"
            )
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise UserError(
                f"{name}[{i}].content: expected text, came {kind(message.get('content'))}"
            )


def kind(value: Any) -> str:
    """A value as a message names it: its type, and what it is, cut if long."""
    if value is None:
        return "nothing (null)"
    return f"{type(value).__name__} {_shown(value)}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _template_keys(template: str) -> tuple[str, ...]:
    """The keys of a template, each as it stands: nothing is looked up inside a value."""
    if not template:
        raise ValueError("expected the name of a key or a template over keys, came ''")
    if "{" not in template and "}" not in template:
        return (template,)
    keys = []
    for _, key, spec, conversion in string.Formatter().parse(template):
        if key is not None:
            if not key or spec or conversion:
                raise ValueError(f"template {template!r}: expected {{key}}, came {{{key}}} or more")
            keys.append(key)
    return tuple(dict.fromkeys(keys))


def _fill(template: str, values: Mapping[str, str]) -> str:
    if "{" not in template and "}" not in template:
        return values[template]
    parts = string.Formatter().parse(template)
    return "".join(text + (values[key] if key is not None else "") for text, key, _, _ in parts)
