"""What a teacher finds most likely at each target of a corpus -> files, found again by content.

The name is a digest of all that the numbers depend on: weights, shape, dtype, platform and the rows
of tokens as they are laid out. The teacher is needed only until the files are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from alignjax.core.processes import any_of
from alignjax.data import Source
from alignjax.train.progress import Progress

FORMAT = 1
"""Part of the digest: raise it when the same inputs give other numbers."""
ROWS = ("tokens", "mask", "positions", "segment_ids", "record", "target")
SUMS = "sums.json"
NOTE_EVERY = 100
"""Batches between two lines on how far it is."""
Rows = Mapping[str, np.ndarray]


class TopK(NamedTuple):
    """The K most likely tokens at each of N targets, record by record. Files, read as needed."""

    starts: np.ndarray
    """[records] int64; the place of a record's first target; -1 where it is left out as too
    long."""
    ids: np.ndarray
    """[N, K] int32; the most likely first."""
    logps: np.ndarray
    """[N, K] float32, nats."""

    def of(self, rows: Rows) -> dict[str, np.ndarray]:
        """`teacher_ids` and `teacher_logps` [..., T, K] at the targets of rows [..., T] of the same
        corpus, in whatever order; zeros elsewhere."""
        mask = rows["mask"]
        places = self.starts[rows["record"][mask]] + rows["target"][mask]
        found = {}
        for name, values in (("teacher_ids", self.ids), ("teacher_logps", self.logps)):
            found[name] = np.zeros((*mask.shape, values.shape[1]), values.dtype)
            found[name][mask] = values[places]
        return found


class Numbered:
    """A source whose records come with their places."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._source[index]

    def where(self, index: int) -> str:
        return self._source.where(index)


def numbered(encode: Callable[[Any], dict[str, np.ndarray]]) -> Callable[[Any], dict[str, Any]]:
    """Of an encoder that of numbered records: each token has the place of its `record`, and each
    target its number among those of the record, as `target`. [length] int32."""

    def encode_numbered(item: tuple[int, Any]) -> dict[str, np.ndarray]:
        index, record = item
        found = encode(record)
        mask = found["mask"]
        target = np.where(mask, np.cumsum(mask) - 1, 0).astype(np.int32)
        return {**found, "record": np.full(len(mask), index, np.int32), "target": target}

    return encode_numbered


def cached(
    compute: Callable[[Rows], tuple[np.ndarray, np.ndarray]],
    batches: Callable[[], Iterable[Rows]],
    num_records: int,
    k: int,
    *,
    key: str,
    directory: Path,
    progress: Progress,
) -> TopK:
    """The teacher's K most likely tokens at each target, from the files if they are there.

    Args:
      compute: rows [M, R, T] -> ids and log-probs [M, R, T, K].
      batches: gives an iterator over all records, each once, in an order that stays, with the
        arrays of `numbered`; asked for once, or twice where they are computed.
      num_records: of the source, those left out as too long included.
      key: digest of what the numbers depend on besides the rows.
      directory: where files are kept.
    """
    digest = hashlib.sha256(f"{FORMAT} {key} {num_records} {k}".encode())
    num_batches = num_targets = 0
    for batch in batches():
        num_batches += 1
        num_targets += int(batch["mask"].sum())
        for name in ROWS:
            digest.update(np.ascontiguousarray(batch[name]).tobytes())
    path = directory / digest.hexdigest()
    is_whole = path.exists() and _is_whole(path)
    if not any_of(not is_whole):  # Each host may have a cache of its own.
        progress.note(f"log-probs of the teacher: read from {path}")
        return _read(path)
    if path.exists() and not is_whole:
        progress.warn(f"{path} is damaged; computing it anew")
        shutil.rmtree(path, ignore_errors=True)  # Another process may be at it as well.
    temporary = path.with_name(f".{path.name}.{jax.process_index()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    starts = np.full(num_records, -1, np.int64)
    ids, logps = (
        np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", dtype, (num_targets, k))
        for name, dtype in (("ids", np.int32), ("logps", np.float32))
    )
    done = 0
    for number, batch in enumerate(batches(), start=1):
        # The targets of a record follow each other, as it lies in one row.
        mask = batch["mask"]
        places = np.arange(done, done + int(mask.sum()))
        is_first = batch["target"][mask] == 0
        starts[batch["record"][mask][is_first]] = places[is_first]
        for values, new in zip((ids, logps), compute(batch), strict=True):
            values[places] = new[mask]
        done += len(places)
        if number % NOTE_EVERY == 0 or number == num_batches:
            progress.note(f"log-probs of the teacher: batch {number} of {num_batches}")
    np.save(temporary / "starts.npy", starts)
    ids.flush()
    logps.flush()
    sums = {file.name: _sum(file) for file in sorted(temporary.glob("*.npy"))}
    (temporary / SUMS).write_text(json.dumps(sums), encoding="utf-8")
    try:
        temporary.rename(path)  # Whole or not at all, also where two runs write it.
    except OSError:
        if not path.exists():
            raise
        shutil.rmtree(temporary)
    return _read(path)


def _read(path: Path) -> TopK:
    return TopK(*(np.load(path / f"{name}.npy", mmap_mode="r") for name in TopK._fields))


def _is_whole(path: Path) -> bool:
    """Whether the files are those that were written."""
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        return sums == {f"{name}.npy": _sum(path / f"{name}.npy") for name in TopK._fields}
    except (OSError, ValueError):
        return False


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
