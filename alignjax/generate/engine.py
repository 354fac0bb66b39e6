"""A model -> a GenerateFn: keeps slots filled with rows until all of them are done."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.core.types import LENGTH, STOP, Completions, Params, Sampling
from alignjax.generate import decode
from alignjax.generate.decode import ANY_TOKEN, NEVER, NO_TOKEN, STEPS, Entry, Limits, Rows
from alignjax.generate.schedule import MIN_SHRUNK, Ladder, Slots, bucket
from alignjax.generate.truncate import Truncation
from alignjax.models import Model, ModelConfig
from alignjax.models.decoding import empty_own, empty_prompts
from alignjax.models.kernels.decode import Seats
from alignjax.sharding.mesh import BATCH_AXES

_STOP_SLOTS = 16


class Progress(NamedTuple):
    """What has been sampled since the last look."""

    tokens: Mapping[int, np.ndarray]
    """Row i * G + g, sample g of prompt i -> its new tokens [n] int32."""
    num_done: int
    """Rows that are complete by now."""


OnTokens = Callable[[Progress], Iterable[int] | None]
"""Called with each progress; rows that it returns are ended there. What it raises ends the call."""

_row_keys = jax.jit(lambda key, rows: jax.vmap(jax.random.fold_in, (None, 0))(key, rows))


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
        self, model: Model, *, mesh: jax.sharding.Mesh | None = None, max_rows: int = 1024
    ):
        """Args: mesh: rows and prompts are split over its data and fsdp axes; max_rows: the most
        rows computed at once, but at least one on each device."""
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected at least 1")
        self.model = model
        self.mesh = mesh
        self.max_rows = max_rows

    def __call__(
        self,
        params: Params,
        prompts: np.ndarray,
        lengths: np.ndarray,
        key: Array,
        sampling: Sampling,
        *,
        max_tokens: np.ndarray | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Completions:
        """See `core.types.GenerateFn`.

        Args:
          max_tokens: [B] int; a limit for each prompt, at most that of `sampling`.
          on_tokens: see `OnTokens`; called every few tokens.
        Raises:
          ValueError: on settings that make no sense.
        """
        prompts, lengths = np.asarray(prompts, np.int32), np.asarray(lengths, np.int32)
        _check(prompts, lengths, sampling, self.model.config)
        call = _Call(self, params, prompts, lengths, key, sampling, max_tokens)
        return call.run(on_tokens)

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)


class _Call:
    """One call of an engine, from its first prompt to its last token."""

    def __init__(
        self, engine: Engine, params: Params, prompts: np.ndarray, lengths: np.ndarray, key: Array,
        sampling: Sampling, max_tokens: np.ndarray | None,
    ):  # fmt: skip
        self._model, self._params = engine.model, params
        self._how = {"model": engine.model, "mesh": engine.mesh}
        self._mesh = {"mesh": engine.mesh}
        self._prompts, self._lengths, self._num_samples = prompts, lengths, sampling.num_samples
        total = len(prompts) * sampling.num_samples
        self._limits = _limits(sampling, engine.model.config)
        keys = _row_keys(key, np.arange(bucket(total), dtype=np.uint32))
        self._keys = np.asarray(keys)[:total]
        each = np.full(len(prompts), sampling.max_tokens)
        if max_tokens is not None:
            each = np.minimum(each, max_tokens)
        self._max_tokens = np.repeat(each, sampling.num_samples).astype(np.int32)
        self.out = Completions(
            tokens=np.zeros((total, sampling.max_tokens), np.int32),
            lengths=np.zeros(total, np.int32),
            logps=np.zeros((total, sampling.max_tokens), np.float32),
            finish_reasons=np.full(total, LENGTH, np.int8),
        )
        self._ladder = Ladder.of(
            len(prompts), prompts.shape[1], sampling.num_samples, sampling.max_tokens,
            max_rows=engine.max_rows, num_devices=engine.num_devices,
        )  # fmt: skip
        self._slots = Slots(self._ladder)
        self._queue = deque(range(total))
        self._num_done = 0

    def run(self, on_tokens: OnTokens | None) -> Completions:
        ladder, slots = self._ladder, self._slots
        num_rows = len(slots.rows)
        self._read = empty_prompts(self._model, ladder.prompts, ladder.width)
        self._rows = Rows(
            keys=jnp.zeros((num_rows, 2), jnp.uint32),
            num_tokens=jnp.zeros(num_rows, jnp.int32),
            max_tokens=jnp.zeros(num_rows, jnp.int32),
            is_done=jnp.ones(num_rows, bool),
            is_stopped=jnp.zeros(num_rows, bool),
            recent=jnp.full((num_rows, self._limits.stops.shape[1]), NO_TOKEN, jnp.int32),
            seats=Seats(*map(jnp.asarray, slots.seating())),
            own=empty_own(self._model, num_rows, ladder.first_capacity),
        )
        while self._queue or slots.num_live:
            if self._queue:
                self._admit()
            if slots.num_live:
                self._advance(STEPS)
            if not self._queue and slots.num_live and slots.can_shrink:
                self._rearrange(self._rows.own.capacity)
        return self.out

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
        entry = Entry(is_new, self._keys[rows], self._max_tokens[rows], Seats(*slots.seating()))
        self._rows, tokens, logps = decode.admit(
            self._params, self._read, self._rows, entry, self._limits, **self._how
        )
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
        self._read = decode.read_into(self._params, self._read, tokens, lengths, to, **self._how)

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
            self._params, self._read, self._rows, self._limits,
            np.int32(min(num_steps, capacity + 1 - longest)), np.int32(min(min_live, num_live - 1)),
            **self._how,
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
            self.out.tokens[row, old:new] = tokens[slot, : new - old]
            self.out.logps[row, old:new] = logps[slot, : new - old]
            self.out.lengths[row] = new
            if is_done[slot]:
                done.append(slot)
                self.out.finish_reasons[row] = STOP if is_stopped[slot] else LENGTH
        slots.counts = np.where(slots.rows >= 0, counts, 0).astype(np.int32)
        slots.empty(done, self._queue, self._num_samples)

    def _rearrange(self, capacity: int) -> None:
        slots = self._slots
        if self._queue:
            source, prompt_source = np.arange(len(slots.rows)), np.arange(len(slots.prompts))
        else:
            source, prompt_source = slots.shrink()
        self._read, self._rows = decode.rearrange(
            self._read, self._rows, source.astype(np.int32), prompt_source.astype(np.int32),
            Seats(*slots.seating()), capacity=capacity, **self._mesh,
        )  # fmt: skip


def make_generate(
    model: Model, *, mesh: jax.sharding.Mesh | None = None, max_rows: int = 1024
) -> Engine:
    """The engine for a model; see `Engine`."""
    return Engine(model, mesh=mesh, max_rows=max_rows)


def _limits(sampling: Sampling, config: ModelConfig) -> Limits:
    """Settings -> arrays."""
    stops = np.full((_STOP_SLOTS, 1), NEVER, np.int32)
    for row, token in zip(stops, sampling.stop_tokens, strict=False):
        row[:] = ANY_TOKEN
        row[-1] = token
    return Limits(
        temperature=np.float32(sampling.temperature),
        truncation=Truncation(
            np.int32(min(sampling.top_k, config.vocab_size)), np.float32(sampling.top_p),
            np.float32(sampling.min_p),
        ),
        stops=stops,
    )  # fmt: skip


def _check(
    prompts: np.ndarray, lengths: np.ndarray, sampling: Sampling, config: ModelConfig
) -> None:
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or not len(prompts):
        raise ValueError(
            f"prompts {prompts.shape}, lengths {lengths.shape}: expected [B, P] and [B] with B >= 1"
        )
    if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()}: expected 1 to {prompts.shape[1]}, "
            "the width of prompts; an empty prompt needs at least a bos token"
        )
    is_real = np.arange(prompts.shape[1]) < lengths[:, None]
    is_wrong = is_real & ((prompts < 0) | (prompts >= config.vocab_size))
    if is_wrong.any():
        row, column = np.argwhere(is_wrong)[0]
        raise ValueError(
            f"prompts: id {prompts[row, column]} in row {row}, column {column}; the model has ids "
            f"0 to {config.vocab_size - 1}"
        )
    is_temperature = 0 <= sampling.temperature < math.inf  # nan is none
    is_share = 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
    if not is_temperature or sampling.top_k < 0 or not is_share:
        raise ValueError(
            f"{sampling}: expected a finite temperature >= 0, top_k >= 0, 0 < top_p <= 1 and "
            "0 <= min_p <= 1"
        )
    if sampling.max_tokens < 1 or sampling.num_samples < 1:
        raise ValueError(f"{sampling}: expected max_tokens and num_samples of at least 1")
    if len(sampling.stop_tokens) > _STOP_SLOTS:
        raise ValueError(f"{len(sampling.stop_tokens)} stop tokens: at most {_STOP_SLOTS}")
    context = config.max_position_embeddings
    if lengths.max() + sampling.max_tokens > context:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and max_tokens={sampling.max_tokens} exceed the "
            f"model's context of {context}; shorten the prompt or lower max_tokens"
        )
