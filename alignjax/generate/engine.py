"""A model -> a GenerateFn: keeps slots filled with rows until all of them are done."""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.core.types import ABORTED, LENGTH, STOP, Completions, Params, Sampling
from alignjax.generate import decode
from alignjax.generate.decode import NO_TOKEN, STEPS, Entry, Rows
from alignjax.generate.limits import check, make_limits
from alignjax.generate.schedule import MIN_SHRUNK, Ladder, Slots, bucket
from alignjax.models import Model, lora
from alignjax.models.decoding import Prompts, empty_own, empty_prompts
from alignjax.models.kernels.decode import Seats
from alignjax.sharding.mesh import BATCH_AXES

_LOOK = 8
"""Tokens of a row between two looks, where someone watches."""


class Progress(NamedTuple):
    """What has been sampled since the last look."""

    tokens: Mapping[int, np.ndarray]
    """Row i * G + g, sample g of prompt i -> its new tokens [n] int32."""
    num_done: int
    """Rows that are complete by now."""


OnTokens = Callable[[Progress], Iterable[int] | None]
"""Called with each progress; rows that it returns are ended there. What it raises ends the call."""

_fold = jax.jit(jax.vmap(jax.random.fold_in))


def _row_keys(
    key: Array, num_prompts: int, num_samples: int, seeds: np.ndarray | None
) -> np.ndarray:
    """[B * G, 2] uint32: the key of each row."""
    total = num_prompts * num_samples
    numbers = np.arange(bucket(total), dtype=np.uint32)
    keys = jnp.broadcast_to(key, (len(numbers), *key.shape))
    if seeds is not None:
        each = np.zeros(len(numbers), np.uint32)
        each[:total] = np.repeat(seeds, num_samples)
        keys, numbers = _fold(keys, each), numbers % num_samples
    return np.asarray(_fold(keys, numbers))[:total]


class Engine:
    """Implements `core.types.GenerateFn` for one model.

    As many rows as `max_rows` allows are computed at once. Each has a slot, which the next row in
    the queue takes when it is done; as the queue runs out, the rows that are left move together.
    The keys and values of a prompt are computed once and serve all its samples; those of what was
    sampled lie in a store that grows with the longest row. A row's samples depend on its key alone.

    Compiled functions are shared by all engines of a model. Their shapes are those of a `Ladder`,
    which follows from the size of a call: the width of the array of prompts counts, not the longest
    prompt in it, so that a caller that fixes its width never recompiles.
    """

    def __init__(
        self,
        model: Model,
        *,
        mesh: jax.sharding.Mesh | None = None,
        max_rows: int = 1024,
        int8_kv: bool = False,
        int8_weights: bool = False,
    ):
        """See `make_generate`."""
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected at least 1")
        self.model, self._quantize = model, None
        if int8_weights and model.quantize is None:
            self.model = dataclasses.replace(model, quantize="int8")
            self._quantize = jax.jit(functools.partial(lora.quantize_base, self.model))
        self.mesh = mesh
        self.max_rows = max_rows
        self.int8_kv = int8_kv

    def __call__(
        self,
        params: Params,
        prompts: np.ndarray,
        lengths: np.ndarray,
        key: Array,
        sampling: Sampling,
        *,
        max_tokens: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Completions:
        """See `core.types.GenerateFn`.

        Args:
          max_tokens: [B] int; a limit for each prompt, which that of `sampling` limits too.
          seeds: [B] int >= 0; a prompt's samples depend on the key and on its seed; by default on
            the key and on the number of the prompt in the call.
          on_tokens: see `OnTokens`; called every few tokens.
        Raises:
          ValueError: on settings that make no sense.
        """
        prompts, lengths = np.asarray(prompts, np.int32), np.asarray(lengths, np.int32)
        check(prompts, lengths, sampling, self.model.config)
        limits = np.full(len(prompts), sampling.max_tokens, np.int32)
        if max_tokens is not None:
            limits = np.minimum(limits, max_tokens)
        for name, values, least in (("max_tokens", limits, 1), ("seeds", seeds, 0)):
            if values is not None and (len(values) != len(prompts) or np.min(values) < least):
                raise ValueError(
                    f"{name} {values}: expected {len(prompts)} numbers of at least {least}, one "
                    "for each prompt"
                )
        if self._quantize is not None:  # Anew in each call: it samples from what was trained last.
            params = self._quantize(params)
        call = _Call(self, params, prompts, lengths, sampling)
        return call.run(
            _row_keys(key, len(prompts), sampling.num_samples, seeds), limits, on_tokens
        )

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)


class _Call:
    """One call of an engine, from its first prompt to its last token."""

    def __init__(
        self, engine: Engine, params: Params, prompts: np.ndarray, lengths: np.ndarray,
        sampling: Sampling,
    ):  # fmt: skip
        self._model, self._mesh, self._params = engine.model, engine.mesh, params
        self._is_int8 = engine.int8_kv
        self._prompts, self._lengths, self._num_samples = prompts, lengths, sampling.num_samples
        self._limits = make_limits(sampling, engine.model.config.vocab_size)
        total = len(prompts) * sampling.num_samples
        self._out = Completions(
            tokens=np.zeros((total, sampling.max_tokens), np.int32),
            lengths=np.zeros(total, np.int32),
            logps=np.zeros((total, sampling.max_tokens), np.float32),
            finish_reasons=np.full(total, ABORTED, np.int8),
        )
        self._ladder = Ladder.of(
            len(prompts), prompts.shape[1], sampling.num_samples, sampling.max_tokens,
            max_rows=engine.max_rows, num_devices=engine.num_devices,
        )  # fmt: skip
        self._slots, self._queue = Slots(self._ladder), deque(range(total))
        self._fresh: dict[int, list[np.ndarray]] = {}
        self._num_done = 0

    def run(
        self, keys: np.ndarray, max_tokens: np.ndarray, on_tokens: OnTokens | None
    ) -> Completions:
        """All rows; keys [B * G, 2] and max_tokens [B] are theirs."""
        self._keys = keys
        self._max_tokens = np.repeat(max_tokens, self._num_samples)
        slots = self._slots
        self._read, self._rows = self._empty()
        while self._queue or slots.num_live:
            if self._queue:
                self._admit()
            if slots.num_live:
                self._advance(STEPS if on_tokens is None else _LOOK)
            if on_tokens is not None:
                fresh = {row: np.concatenate(parts) for row, parts in self._fresh.items()}
                self._end(on_tokens(Progress(fresh, self._num_done)) or ())
            self._fresh = {}
            if not self._queue and slots.num_live and slots.can_shrink:
                self._rearrange(self._rows.own.capacity)
        return self._out

    def _empty(self) -> tuple[Prompts, Rows]:
        ladder, slots = self._ladder, self._slots
        num_rows, vocab_size = len(slots.rows), self._model.config.vocab_size
        rows = Rows(
            keys=jnp.zeros((num_rows, 2), jnp.uint32),
            num_tokens=jnp.zeros(num_rows, jnp.int32),
            max_tokens=jnp.zeros(num_rows, jnp.int32),
            is_done=jnp.ones(num_rows, bool),
            is_stopped=jnp.zeros(num_rows, bool),
            recent=jnp.full((num_rows, self._limits.stops.shape[1]), NO_TOKEN, jnp.int32),
            is_seen=(
                None if self._limits.penalty is None else jnp.zeros((num_rows, vocab_size), bool)
            ),
            seats=Seats(*map(jnp.asarray, slots.seating())),
            own=empty_own(self._model, num_rows, ladder.first_capacity, is_int8=self._is_int8),
        )
        places = ladder.prompts, ladder.width
        return empty_prompts(self._model, *places, is_int8=self._is_int8), rows

    def _end(self, rows: Iterable[int]) -> None:
        """Frees the slots of rows, and takes those that wait off the queue."""
        ended = set(rows)
        if ended:
            self._queue = deque(row for row in self._queue if row not in ended)
            slots = np.flatnonzero(np.isin(self._slots.rows, [*ended]))
            self._slots.empty(slots, self._queue, self._num_samples)

    def _admit(self) -> None:
        """Fills free slots from the queue."""
        slots = self._slots
        filled, read = slots.fill(self._queue, self._num_samples)
        for start in range(0, len(read), self._ladder.read):
            self._read_prompts(read[start : start + self._ladder.read])
        if not filled:
            return
        rows = np.maximum(slots.rows, 0)
        is_new = np.zeros(len(rows), bool)
        is_new[filled] = True
        entry = Entry(
            is_new, self._keys[rows], self._max_tokens[rows], self._seen(rows),
            Seats(*slots.seating()),
        )  # fmt: skip
        self._rows, tokens, logps = decode.admit(
            self._params, self._read, self._rows, entry, self._limits,
            model=self._model, mesh=self._mesh,
        )  # fmt: skip
        self._collect(tokens[:, None], logps[:, None])

    def _read_prompts(self, places: list[int]) -> None:
        ladder = self._ladder
        which = self._slots.prompts[places]
        tokens = np.zeros((ladder.read, ladder.width), np.int32)
        tokens[: len(which), : self._prompts.shape[1]] = self._prompts[which]
        lengths = np.ones(ladder.read, np.int32)
        lengths[: len(which)] = self._lengths[which]
        to = np.full(ladder.read, ladder.prompts, np.int32)
        to[: len(which)] = places
        self._read = decode.read_into(
            self._params, self._read, tokens, lengths, to, model=self._model, mesh=self._mesh
        )

    def _seen(self, rows: np.ndarray) -> np.ndarray | None:
        """[N, V] bool: the tokens of the prompt of each of some rows, where they are asked for."""
        if self._limits.penalty is None:
            return None
        which = rows // self._num_samples
        is_seen = np.zeros((len(rows), self._model.config.vocab_size), bool)
        is_real = np.arange(self._prompts.shape[1]) < self._lengths[which, None]
        number = np.broadcast_to(np.arange(len(rows))[:, None], is_real.shape)
        is_seen[number[is_real], self._prompts[which][is_real]] = True
        return is_seen

    def _advance(self, num_steps: int) -> None:
        """Adds tokens until enough rows are done to do something about it."""
        slots = self._slots
        num_live, num_rows = slots.num_live, len(slots.rows)
        longest = int(slots.counts[slots.rows >= 0].max())
        capacity = self._rows.own.capacity
        if longest > capacity:
            self._rearrange(min(2 * capacity, self._ladder.capacity))
            capacity, num_rows = self._rows.own.capacity, len(slots.rows)
        min_live = 0
        if self._queue:
            min_live = num_rows - max(1, num_rows // 4)
        elif num_rows % 2 == 0 and num_rows // 2 >= MIN_SHRUNK:
            min_live = num_rows // 2
        self._rows, tokens, logps = decode.advance(
            self._params, self._read, self._rows, slots.rows < 0, self._limits,
            np.int32(min(num_steps, capacity + 1 - longest)), np.int32(min(min_live, num_live - 1)),
            model=self._model, mesh=self._mesh,
        )  # fmt: skip
        self._collect(tokens, logps)

    def _collect(self, tokens: Array, logps: Array) -> None:
        """Takes over what the rows have got since the last look, and frees those that are done."""
        slots, rows = self._slots, self._rows
        tokens, logps, counts, is_done, is_stopped = jax.device_get(
            (tokens, logps, rows.num_tokens, rows.is_done, rows.is_stopped)
        )
        done = []
        for slot in np.flatnonzero(slots.rows >= 0):
            row, old, new = slots.rows[slot], slots.counts[slot], counts[slot]
            self._out.tokens[row, old:new] = tokens[slot, : new - old]
            self._out.logps[row, old:new] = logps[slot, : new - old]
            self._out.lengths[row] = new
            self._fresh.setdefault(int(row), []).append(tokens[slot, : new - old])
            if is_done[slot]:
                done.append(slot)
                self._out.finish_reasons[row] = STOP if is_stopped[slot] else LENGTH
        slots.counts = np.where(slots.rows >= 0, counts, 0).astype(np.int32)
        self._num_done += len(done)
        slots.empty(done, self._queue, self._num_samples)

    def _rearrange(self, capacity: int) -> None:
        slots = self._slots
        if self._queue:
            source, prompt_source = np.arange(len(slots.rows)), np.arange(len(slots.prompts))
        else:
            source, prompt_source = slots.shrink()
        self._read, self._rows = decode.rearrange(
            self._read, self._rows, source.astype(np.int32), prompt_source.astype(np.int32),
            Seats(*slots.seating()), capacity=capacity, mesh=self._mesh,
        )  # fmt: skip


def make_generate(
    model: Model,
    *,
    mesh: jax.sharding.Mesh | None = None,
    max_rows: int = 1024,
    int8_kv: bool = False,
    int8_weights: bool = False,
) -> Engine:
    """The engine for a model.

    Args:
      mesh: rows and prompts are split over its data and fsdp axes.
      max_rows: the most rows computed at once, but at least one on each device.
      int8_kv: keys and values are kept as codes, each head of each token with a scale of its own;
        for memory: each is within 1/254 of the largest of its head.
      int8_weights: the kernels of the layers become codes in each call, whatever holds them
        otherwise; adapters stay as they are. What is sampled is then of a slightly other model than
        the one that is trained, and so are its log-probs.
    """
    return Engine(model, mesh=mesh, max_rows=max_rows, int8_kv=int8_kv, int8_weights=int8_weights)
