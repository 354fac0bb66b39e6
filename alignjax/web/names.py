"""What somebody calls themselves -> the name that their rankings are stored under."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from alignjax.core.errors import UserError

MAX_NAME_LEN = 64


def check_name(name: str, annotators: Sequence[str] = ()) -> str:
    """The name of a person as it is stored.

    Raises:
      UserError: if it is none, or none of `annotators` where there are any.
    """
    name = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(name) <= MAX_NAME_LEN or not name.isprintable():
        raise UserError(
            f"name {name[:MAX_NAME_LEN]!r}: expected 1 to {MAX_NAME_LEN} characters on a line"
        )
    if annotators and name not in annotators:
        raise UserError(
            f"unknown annotator {name!r}; this page is for {', '.join(annotators)}. "
            "Whoever started it may add a name to --annotators"
        )
    return name
