"""One call of the engine: rows that take slots, get tokens and leave again, until none is left."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax.core.types import ABORTED, LENGTH, STOP, Completions, Params, Sampling
from alignjax.generate import decode
from alignjax.generate.decode import NO_TOKEN, STEPS, Entry, Rows
from alignjax.generate.limits import make_limits
from alignjax.generate.schedule import MIN_SHRUNK, Ladder, Slots
from alignjax.models import Model
from alignjax.models.decoding import Prompts, empty_own, empty_prompts
from alignjax.models.kernels.decode import Seats
from alignjax.sharding import fetch

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


class Call:
    """One call of an engine, from its first prompt to its last token."""

    def __init__(
        self, model: Model, mesh: Mesh | None, params: Params, prompts: np.ndarray,
        lengths: np.ndarray, sampling: Sampling, ladder: Ladder, *, int8_kv: bool,
    ):  # fmt: skip
        """See `core.types.GenerateFn`. Args: ladder: of a call of this size; int8_kv: keeps keys
        and values as codes."""
        self._model, self._mesh, self._params = model, mesh, params
        self._is_int8 = int8_kv
        self._prompts, self._lengths, self._num_samples = prompts, lengths, sampling.num_samples
        self._limits = make_limits(sampling, model.config.vocab_size)
        total = len(prompts) * sampling.num_samples
        self._out = Completions(
            tokens=np.zeros((total, sampling.max_tokens), np.int32),
            lengths=np.zeros(total, np.int32),
            logps=np.zeros((total, sampling.max_tokens), np.float32),
            finish_reasons=np.full(total, ABORTED, np.int8),
        )
        self._ladder = ladder
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
        if self._mesh is not None and not self._mesh.local_devices:
            # Nothing is computed here. Of a mesh of a single far device, jax takes no arrays but
            # those that lie there and NumPy's: of others it dies.
            self._read, self._rows = jax.tree.map(
                lambda x: np.asarray(x) if x.is_fully_addressable else x, (self._read, self._rows)
            )
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
                self._shrink()
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
            capacity = min(2 * capacity, self._ladder.capacity)
            self._rows = decode.grow(self._rows, capacity=capacity, mesh=self._mesh)
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
        tokens, logps, counts, is_done, is_stopped = fetch(
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

    def _shrink(self) -> None:
        source, prompt_source = self._slots.shrink()
        self._read, self._rows = decode.rearrange(
            self._read, self._rows, source, prompt_source, Seats(*self._slots.seating()),
            mesh=self._mesh,
        )  # fmt: skip
