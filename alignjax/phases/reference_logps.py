"""What a reference thinks of all comparisons -> a file, computed once and found again by content.

The file's name is a digest of all that the numbers depend on: weights, shape, dtype, platform and
the rows of tokens as they are laid out.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alignjax.core.processes import any_of
from alignjax.core.types import Params
from alignjax.sharding import fetch
from alignjax.train.progress import Progress

FORMAT = 1
"""Part of the digest: raise it when the same inputs give other numbers."""
Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]
ROWS = ("tokens", "mask", "positions", "segment_ids", "branches", "index")
NOTE_EVERY = 100
"""Batches between two lines on how far it is."""


def default_cache() -> Path:
    """alignjax/reference in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return root / "alignjax" / "reference"


def cached(
    compute: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    batches: Batches,
    num_elements: int,
    num_responses: int,
    *,
    key: str,
    directory: Path,
    progress: Progress,
) -> np.ndarray:
    """Log-probs of each completion of each comparison, from the file if it is there.

    Args:
      compute: a batch -> [M, R, N, K] float32, nats.
      batches: gives an iterator over all comparisons, each once, in an order that stays; asked for
        once, or twice where they are computed.
      num_elements: comparisons of the view, those left out as too long included.
      num_responses: K.
      key: digest of what the numbers depend on besides the rows.
      directory: where files are kept.
    Returns:
      [num_elements, K] float32; nan where a comparison is left out.
    """
    digest = hashlib.sha256(f"{FORMAT} {key} {num_elements} {num_responses}".encode())
    num_batches = 0
    for batch in batches():
        num_batches += 1
        for name in ROWS:
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
    path = directory / f"{digest.hexdigest()}.npz"
    found = _read(path, (num_elements, num_responses), progress)
    is_missing = any_of(found is None)  # Each host may have a cache of its own.
    if found is not None and not is_missing:
        progress.note(f"log-probs of the reference: read from {path}")
        return found
    found = np.full((num_elements, num_responses), np.nan, np.float32)
    for number, batch in enumerate(batches(), start=1):
        is_there = batch["index"] >= 0
        found[batch["index"][is_there]] = compute(batch)[is_there]
        if number % NOTE_EVERY == 0 or number == num_batches:
            progress.note(f"log-probs of the reference: batch {number} of {num_batches}")
    _write(path, found)
    return found


def weights_digest(params: Params, **others: Any) -> str:
    """SHA-256 of all arrays, with their names, and of `others`, JSON values.

    One array after the other comes to the host.
    """
    total = hashlib.sha256(json.dumps(others, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = fetch(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _read(path: Path, shape: tuple[int, int], progress: Progress) -> np.ndarray | None:
    """The array; None if there is none, or it is not whole, which is said."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:  # Each member has a checksum.
            found = file["logps"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        progress.warn(f"{path} is damaged ({error}); computing it anew")
        return None
    if found.shape != shape or found.dtype != np.float32:
        progress.warn(f"{path} is damaged (it holds {found.dtype}{list(found.shape)}); computing "
                      "it anew")  # fmt: skip
        return None
    return found


def _write(path: Path, logps: np.ndarray) -> None:
    """The file appears whole or not at all, also where two runs write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{jax.process_index()}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, logps=logps)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
