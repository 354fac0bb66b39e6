"""A source of records -> batches on the host, in an order that is a function of seed and epoch.

The position in the data is one number: how many records of this process's shard were emitted. So a
state is a JSON value, restoring it is O(1), and what follows is exactly what would have followed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from alignjax.core.errors import UserError
from alignjax.data.packing import pack
from alignjax.data.sources import Source

T = TypeVar("T")
Overlong = Literal["error", "drop"]
log = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """What is to be gone on from, and the record that it is from."""

    tokens: np.ndarray
    """[length] int32."""
    example: Any
    """What the source gave."""


class RecordIterator(Iterator[T]):
    """Batches, with the position in the data as a value. Made by `token_rows` and `examples`."""

    def __init__(
        self,
        source: Source,
        encode: Callable[[int], Any],
        take: Callable[[Callable[[int], list[Any]]], tuple[T, int] | None],
        *,
        shuffle: bool,
        seed: int,
        num_epochs: int | None,
        num_threads: int,
    ):
        """Args beyond those of `token_rows`:

        encode: index of a record -> an item, or None to drop it.
        take: is given `pending(n)`, the first n items not yet emitted (fewer where the data end),
          and returns a batch with how many of them it holds, or None at the end.
        """
        self._identity = {"num_records": len(source)}
        self._take = take
        self._dataset = _dataset(len(source), encode, shuffle, seed, num_epochs, num_threads)
        self._seek(0, 0)

    def __next__(self) -> T:
        batch = self._take(self._peek)
        if batch is None:
            raise StopIteration
        value, num_used = batch
        for _ in range(num_used):
            self._pending.popleft()
        # What was dropped between two items goes with the one before it.
        position, dropped, _ = (
            self._pending[0] if self._pending else (self._read, self._dropped, None)
        )
        self._emitted = position, dropped
        return value

    @property
    def epoch(self) -> float:
        """How many times the data were gone through."""
        return self._emitted[0] / self._identity["num_records"]

    @property
    def num_dropped(self) -> int:
        """Records left out so far because they were too long."""
        return self._emitted[1]

    def get_state(self) -> dict[str, Any]:
        """A JSON value: where the next batch begins, and of what data."""
        position, num_dropped = self._emitted
        return {"position": position, "num_dropped": num_dropped, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called, in an iterator made with the same arguments.

        Raises:
          UserError: if the data have another number of records now.
        """
        came = {key: state[key] for key in self._identity}
        if came != self._identity:
            raise UserError(
                f"data: the position was saved with {came}, now there is {self._identity}; resume "
                "with the same data, or start a new run"
            )
        self._seek(state["position"], state["num_dropped"])

    def _seek(self, position: int, num_dropped: int) -> None:
        self._emitted = position, num_dropped
        self._read: int = position
        self._dropped: int = num_dropped
        self._pending: deque[tuple[int, int, Any]] = deque()  # Position, dropped before it, item.
        self._records = iter(self._dataset)
        self._records.set_state({"next_index": self._read})

    def _peek(self, n: int) -> list[Any]:
        in_vain = 0
        while len(self._pending) < n:
            try:
                item, error = next(self._records)
            except StopIteration:
                if self._dropped == self._read > 0:
                    raise _all_dropped(self._read) from None
                break
            if error is not None:
                self._records.set_state(
                    {"next_index": self._read}
                )  # Asked again, it says so again.
                raise error
            self._read += 1
            if item is not None:
                self._pending.append((self._read - 1, self._dropped, item))
                in_vain = 0
                continue
            self._dropped += 1
            in_vain += 1
            if in_vain > 2 * self._identity["num_records"]:
                raise _all_dropped(in_vain)
        return [item for *_, item in self._pending]


def token_rows(
    source: Source,
    encode: Callable[[Any], dict[str, np.ndarray]],
    *,
    num_micro_batches: int,
    rows: int,
    row_len: int,
    packed: bool = True,
    shuffle: bool = True,
    seed: int = 0,
    num_epochs: int | None = None,
    overlong: Overlong = "error",
    num_threads: int = 2,
) -> RecordIterator[dict[str, np.ndarray]]:
    """Batches of token rows (see `packing.pack`), each a dict of [M, R, T].

    For an evaluation that sees each record once: `shuffle=False, num_epochs=1`. Where the data end,
    the last batch is filled up with empty rows.

    Where several processes train together, each makes the same batches, and gives its devices the
    rows that are theirs: the order, and where a run goes on, do not depend on their number.

    Args:
      source: records.
      encode: record -> `tokens`, `mask` and whatever else is per token; called in threads.
      num_micro_batches, rows, row_len: M, R and T.
      packed: lay several sequences into a row.
      shuffle: anew in each epoch, by `seed`.
      seed: of the order, 0 to 2^32 - 1.
      num_epochs: None never ends.
      overlong: what to do with a sequence longer than `row_len`: it is never cut.
      num_threads: that read and encode ahead; 0 reads when asked. The order does not depend on it.
    Raises:
      UserError: when such a record is reached: it is too long (with "error"), has no target, or
        `encode` refuses it; the place of the record is named.
    """
    num_rows = num_micro_batches * rows

    def encode_at(index: int) -> dict[str, np.ndarray] | None:
        sequence = located(source, index, encode)
        if not fits(source, index, len(sequence["tokens"]), row_len, overlong):
            return None
        if not sequence["mask"].any():
            raise UserError(
                f"{source.where(index)}: none of its {len(sequence['tokens'])} tokens is a target"
            )
        return sequence

    def take(pending: Callable[[int], list[Any]]) -> tuple[dict[str, np.ndarray], int] | None:
        # More than can fit, so that the batch is a function of the position alone.
        sequences = pending(num_rows)
        while packed and sum(len(s["tokens"]) for s in sequences) <= num_rows * row_len:
            more = pending(2 * len(sequences))
            if len(more) == len(sequences):
                break
            sequences = more
        if not sequences:
            return None
        batch, num_used = pack(sequences, num_rows=num_rows, row_len=row_len, packed=packed)
        shape = (num_micro_batches, rows, row_len)
        return {key: value.reshape(shape) for key, value in batch.items()}, num_used

    return RecordIterator(
        source,
        encode_at,
        take,
        shuffle=shuffle,
        seed=seed,
        num_epochs=num_epochs,
        num_threads=num_threads,
    )


def examples(
    source: Source,
    encode: Callable[[Any], np.ndarray],
    *,
    num_prompts: int,
    prompt_len: int,
    shuffle: bool = True,
    seed: int = 0,
    num_epochs: int | None = None,
    overlong: Overlong = "error",
    num_threads: int = 2,
) -> RecordIterator[list[Prompt]]:
    """Lists of `num_prompts` prompts; where the data end, the last list is shorter.

    Args:
      source: records.
      encode: record -> the ids of its prompt, [length] int32; called in threads.
      num_prompts: in each list.
      prompt_len: most tokens that a prompt may have.
      shuffle, seed, num_epochs, overlong, num_threads: as in
        `token_rows`.
    Raises:
      UserError: when such a record is reached: its prompt is empty, too long (with "error"), or
        `encode` refuses it; the place of the record is named.
    """

    def encode_at(index: int) -> Prompt | None:
        prompt = located(source, index, lambda example: Prompt(encode(example), example))
        if len(prompt.tokens) == 0:
            raise UserError(f"{source.where(index)}: the prompt has no tokens")
        return prompt if fits(source, index, len(prompt.tokens), prompt_len, overlong) else None

    def take(pending: Callable[[int], list[Any]]) -> tuple[list[Prompt], int] | None:
        prompts = pending(num_prompts)[:num_prompts]
        return (prompts, len(prompts)) if prompts else None

    return RecordIterator(
        source,
        encode_at,
        take,
        shuffle=shuffle,
        seed=seed,
        num_epochs=num_epochs,
        num_threads=num_threads,
    )


def _all_dropped(num: int) -> UserError:
    return UserError(
        f"data: every one of the last {num} records is too long and was dropped; allow more tokens"
    )


def located(source: Source, index: int, encode: Callable[[Any], T]) -> T:
    record = source[index]
    try:
        return encode(record)
    except UserError as error:
        raise UserError(f"{source.where(index)}: {error}") from error


def fits(source: Source, index: int, length: int, limit: int, overlong: Overlong) -> bool:
    if length <= limit:
        return True
    what = f"{source.where(index)}: {length} tokens, but only {limit} fit"
    if overlong == "error":
        raise UserError(f'{what}; allow more, shorten the record, or set overlong to "drop"')
    log.info("%s; dropped", what)
    return False


def _dataset(
    length: int,
    encode: Callable[[int], Any],
    shuffle: bool,
    seed: int,
    num_epochs: int | None,
    num_threads: int,
) -> Any:
    """A grain dataset of (item, error): grain adds lines of its own to what is raised inside it."""
    import grain  # Imports jax, which reading data does not need before this point.

    def attempt(index: int) -> tuple[Any, UserError | None]:
        try:
            return encode(int(index)), None
        except UserError as error:
            return None, error

    indices = grain.MapDataset.range(length).seed(seed)
    if shuffle:
        indices = indices.shuffle()
    return (
        indices.repeat(num_epochs)
        .map(attempt)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=32 * num_threads)
        )
    )
