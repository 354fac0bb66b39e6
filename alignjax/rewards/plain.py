"""A value of a record -> JSON: what a column of Parquet or NumPy may hold beyond it, spelled."""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from typing import Any


def to_json(value: Any) -> str:
    """JSON of a value; see `functions` for how dates, decimals and bytes are spelled.

    Raises:
      TypeError, ValueError, RecursionError: on a value that has no JSON.
    """
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    match value:
        case datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return None
        case _ if hasattr(value, "tolist"):  # A NumPy array or scalar.
            return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def short(text: str, limit: int = 80) -> str:
    """The text in quotes, without its middle if it is long."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}")
