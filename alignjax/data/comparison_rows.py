"""Elements -> rows that hold each of them whole, its prompt with all its completions.

Like token rows, with one array more: `branches`. Two layouts hold the same:

  shared:   [prompt less its last token | that token, completion 1 | that token, completion 2 ...]
  unshared: [prompt, completion 1 | prompt, completion 2 | ...]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alignjax.data.elements import Element, lay_out
from alignjax.data.packing import pack
from alignjax.data.pipeline import Overlong, RecordIterator, fits, located
from alignjax.data.sources import Source


def pack_elements(
    elements: Sequence[Element],
    *,
    num_rows: int,
    row_len: int,
    num_responses: int,
    shared_prompt: bool,
    packed: bool = True,
) -> dict[str, np.ndarray]:
    """Lays elements into rows, each into the first that has room.

    Args:
      elements: at most `num_rows`, none longer than a row.
      num_rows: R.
      row_len: T.
      num_responses: K, at least as many as an element has.
      shared_prompt: which layout.
      packed: lay several elements into a row; otherwise one in each.
    Returns:
      [R, T]: `tokens`, `mask`, `positions`, `branches` of `lay_out` and `segment_ids` (int32; n =
      1.. on the n-th element of the row, 0 on padding). [R, N, ...], N = `most_in_row`, one entry
      for each element of the row, zeros where there is none: `ranks` [R, N, K] int32 (0 where there
      is no completion), `margins` [R, N] float32, `labels` [R, N] bool (True also where no label
      is), `index` [R, N] int32 (the element's; -1 where there is none).
    """
    most = most_in_row(num_rows, row_len, packed=packed)
    sequences = []
    for number, element in enumerate(elements):
        sequence = lay_out(element, shared_prompt=shared_prompt)
        sequence["element"] = np.full(len(sequence["tokens"]), number, np.int32)
        sequences.append(sequence)
    rows, num_used = pack(sequences, num_rows=num_rows, row_len=row_len, packed=packed)
    assert num_used == len(elements), "as many rows as elements hold them all"
    owner = rows.pop("element")
    out = {
        "ranks": np.zeros((num_rows, most, num_responses), np.int32),
        "margins": np.zeros((num_rows, most), np.float32),
        "labels": np.ones((num_rows, most), bool),
        "index": np.full((num_rows, most), -1, np.int32),
    }
    for row, segments in enumerate(rows["segment_ids"]):
        for n in range(segments.max()):
            element = elements[owner[row, np.argmax(segments == n + 1)]]
            out["ranks"][row, n, : len(element.ranks)] = element.ranks
            out["margins"][row, n] = element.margin
            out["labels"][row, n] = element.label is not False
            out["index"][row, n] = element.index
    return rows | out


def most_in_row(num_rows: int, row_len: int, *, packed: bool = True) -> int:
    """N: elements that a row may hold, each of which has a prompt and a completion at least."""
    return min(num_rows, row_len // 2) if packed else 1


def comparison_rows(
    source: Source,
    encode: Callable[[Any], Element],
    *,
    num_prompts: int,
    num_micro_batches: int,
    row_len: int,
    num_responses: int,
    shared_prompt: bool,
    max_len: int | None = None,
    packed: bool = True,
    shuffle: bool = True,
    seed: int = 0,
    num_epochs: int | None = None,
    overlong: Overlong = "drop",
    num_threads: int = 2,
) -> RecordIterator[dict[str, np.ndarray]]:
    """Batches of `num_prompts` elements each, dicts of [M, R, ...]; see `pack_elements`.

    Elements fill the rows densely from the first one on, so that the last micro-batches stay empty.
    Where the data end (`num_epochs`), the last batch holds fewer elements, in the same shapes.

    Args:
      source: of `Comparison`; see `data.comparisons`.
      encode: comparison -> its ids; see `comparison_encoder`. Called in threads.
      num_prompts: elements in a batch, and rows: M times R.
      num_micro_batches: M.
      row_len: T; an element that takes more is overlong.
      num_responses: K; see `View.num_responses`.
      shared_prompt: which layout.
      max_len: of a prompt with one completion, such as the model's context; more is overlong.
      packed: lay several elements into a row.
      overlong: what to do with an element that is too long: it is never cut.
      shuffle, seed, num_epochs, num_threads: as in `token_rows`.
    Raises:
      ValueError: if num_prompts does not divide into the micro-batches.
      UserError: when such a record is reached: it is too long (with "error"), or `encode` refuses
        it; the place of the record is named.
    """
    if num_prompts % num_micro_batches:
        raise ValueError(
            f"num_prompts={num_prompts} does not divide into {num_micro_batches} micro-batches"
        )
    limit = row_len if max_len is None else max_len

    def encode_at(index: int) -> Element | None:
        element = located(source, index, encode)
        length = element.num_tokens(shared_prompt=shared_prompt)
        is_whole = fits(source, index, element.longest, limit, overlong) and fits(
            source, index, length, row_len, overlong
        )
        return replace(element, index=index) if is_whole else None

    def take(
        pending: Callable[[int], list[Element]],
    ) -> tuple[dict[str, np.ndarray], int] | None:
        elements = pending(num_prompts)[:num_prompts]
        if not elements:
            return None
        batch = pack_elements(
            elements,
            num_rows=num_prompts, row_len=row_len, num_responses=num_responses,
            shared_prompt=shared_prompt, packed=packed,
        )  # fmt: skip
        shape = num_micro_batches, num_prompts // num_micro_batches
        return {k: v.reshape(*shape, *v.shape[1:]) for k, v in batch.items()}, len(elements)

    return RecordIterator(
        source,
        encode_at,
        take,
        shuffle=shuffle,
        seed=seed,
        num_epochs=num_epochs,
        num_threads=num_threads,
    )


def branch_segments(batch: Mapping[str, Any], num_responses: int) -> Any:
    """(segment_ids - 1) K + branches on branches 1 to K, else 0: a number for each completion of a
    row, [..., T] int32, 1 to N K. Of NumPy arrays or those of jax.

    Entry s - 1 of `losses.sequence_logps(..., num_segments=N * K)` is completion s; reshaped, it is
    [R, N, K]. Without shared prompts these are also the segment ids that a model takes.
    """
    branches = batch["branches"]
    return ((batch["segment_ids"] - 1) * num_responses + branches) * (branches > 0)
