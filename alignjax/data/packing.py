"""Token sequences of any length -> rows of one length, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def pack(
    sequences: Sequence[Mapping[str, np.ndarray]],
    *,
    num_rows: int,
    row_len: int,
    packed: bool = True,
) -> tuple[dict[str, np.ndarray], int]:
    """Lays sequences into rows, in order, each into the first row that has room (first fit).

    Stops at the first sequence that fits nowhere, so that what is used is always a prefix and a
    position in the data is one number.

    Args:
      sequences: each a dict of [length] arrays, the same keys in all: `tokens` (int32), `mask`
        (bool) and anything else per token, such as `old_logps` and `advantages` (float32).
      num_rows: R.
      row_len: T.
      packed: lay several sequences into a row; otherwise one in each.
    Returns:
      Token rows, a dict of [R, T]: the keys of the sequences (0 where nothing lies; without any
      sequence, `tokens` and `mask`), `segment_ids` (int32; 0 on padding, 1, 2, ... along the row)
      and `positions` (int32; from 0 in each segment, unless the sequences bring their own); and how
      many sequences were used.
    Raises:
      ValueError: on a sequence that is empty, longer than `row_len`, with arrays of several
        lengths, with other keys than the first, or with its first token in the mask.
    """
    kinds = {"tokens": np.dtype(np.int32), "mask": np.dtype(bool)}
    if sequences:
        kinds |= {key: np.asarray(value).dtype for key, value in sequences[0].items()}
    rows = {key: np.zeros((num_rows, row_len), kind) for key, kind in kinds.items()}
    segment_ids = np.zeros((num_rows, row_len), np.int32)
    positions = np.zeros((num_rows, row_len), np.int32)
    count = np.arange(row_len, dtype=np.int32)
    used = np.zeros(num_rows, np.int64)  # Tokens in each row.
    segments = [0] * num_rows
    num_used = 0
    for n, sequence in enumerate(sequences):
        length = _check(sequence, kinds, row_len, n)
        if packed:
            fits = used <= row_len - length
            row = int(fits.argmax()) if num_rows else 0
            if not num_rows or not fits[row]:
                break
        elif (row := n) >= num_rows:
            break
        start = int(used[row])
        used[row] = stop = start + length
        segments[row] += 1
        for key, value in sequence.items():
            rows[key][row, start:stop] = value
        segment_ids[row, start:stop] = segments[row]
        positions[row, start:stop] = count[:length]
        num_used += 1
    return {"positions": positions, **rows, "segment_ids": segment_ids}, num_used


def _check(
    sequence: Mapping[str, np.ndarray], kinds: Mapping[str, np.dtype], row_len: int, n: int
) -> int:
    if sequence.keys() != kinds.keys():
        raise ValueError(f"sequences[{n}]: expected keys {sorted(kinds)}, came {sorted(sequence)}")
    length = len(sequence["tokens"])
    if not 0 < length <= row_len:
        raise ValueError(f"sequences[{n}]: expected 1 to row_len={row_len} tokens, came {length}")
    for key, value in sequence.items():
        if len(value) != length:
            raise ValueError(f"sequences[{n}]: {length} tokens but {len(value)} {key}")
    if sequence["mask"][0]:
        raise ValueError(f"sequences[{n}]: the first token is in the mask, but nothing predicts it")
    return length
