"""A JSON value, a file or a directory -> its SHA-256, which says whether two are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def of_value(value: Any) -> str:
    """Of a JSON value; the order of the keys of its objects does not count."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_path(path: Path) -> str:
    """Of the contents of a file; of a directory those of all files below it, and their names."""
    total = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(path)}\n{digest}\n".encode())
    return total.hexdigest()
