"""Records -> the texts of some of their fields, to train a vocabulary on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data.sources import Source


def texts(source: Source, fields: Sequence[str], *, limit: int | None = None) -> Iterator[str]:
    """The text of the fields, or of all fields if none is named, of the first `limit` records.

    Raises:
      UserError: naming the record, if it does not have a field, no text stands there, or half a
        character.
    """
    for index in range(len(source) if limit is None else min(limit, len(source))):
        record = source[index]
        for name in fields or record:
            if name not in record:
                raise UserError(
                    f"{source.where(index)}: no field {name!r}; there are {', '.join(record)}"
                )
            found = list(_strings(record[name]))
            if fields and not found:
                raise UserError(f"{source.where(index)}: field {name!r} holds no text")
            for text in found:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"{source.where(index)}: field {name!r}: character {error.start + 1} of "
                        "the text is half a character (a surrogate)"
                    ) from error
                yield text


def _strings(value: Any) -> Iterator[str]:
    """A text, or the contents of chat messages; nothing else is text to train on."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            content = item.get("content") if isinstance(item, dict) else item
            if isinstance(content, str):
                yield content
