"""Eight sequences -> token rows: one each or packed, padded on either side, by any amount."""

from collections.abc import Mapping, Sequence

import numpy as np

LENGTHS = (9, 4, 7, 2, 12, 3, 5, 8)
PLAIN = [[i] for i in range(8)]
PACKED = [[0, 1], [4], [2, 3, 5], [7, 6]]
"""Sequences by row."""
OTHERS = ((PLAIN, 19, False), (PLAIN, 19, True), (PACKED, 15, False), ([*PACKED, []], 21, True))
"""Layout, time steps and whether padding is on the left; PLAIN in 12 steps is what they equal."""

Layout = Sequence[Sequence[int]]


def targets(length: int) -> np.ndarray:
    """[length] bool; the first half of each sequence is a prompt."""
    return np.arange(length) >= (length + 1) // 2


def starts(layout: Layout, time: int, left: bool = False) -> dict[int, tuple[int, int]]:
    """Sequence -> its row, and the time at which it begins."""
    out = {}
    for row, members in enumerate(layout):
        at = time - sum(LENGTHS[i] for i in members) if left else 0
        for i in members:
            out[i] = row, at
            at += LENGTHS[i]
    return out


def lay_out(
    made: Sequence[Mapping[str, np.ndarray]], layout: Layout, time: int, left: bool = False
) -> dict[str, np.ndarray]:
    """Arrays over the tokens of each sequence -> rows with `mask` and `segment_ids`; padding is
    dirt: nan, -7 or True."""
    shape = len(layout), time
    out = {"mask": np.zeros(shape, bool), "segment_ids": np.zeros(shape, np.int32)}
    for name, x in made[0].items():
        dirt = np.nan if np.issubdtype(x.dtype, np.floating) else True if x.dtype == bool else -7
        out[name] = np.full((*shape, *x.shape[1:]), dirt, x.dtype)
    for i, (row, at) in starts(layout, time, left).items():
        where = row, slice(at, at + LENGTHS[i])
        out["mask"][where] = targets(LENGTHS[i])
        out["segment_ids"][where] = layout[row].index(i) + 1
        for name, x in made[i].items():
            out[name][where] = x
    return out
