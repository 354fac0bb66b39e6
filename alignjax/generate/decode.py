"""Rows of tokens -> rows with more tokens: the compiled functions that the engine calls in turn.

`read_into` reads prompts, `admit` gives rows to free slots and draws their first tokens, `advance`
adds tokens to all rows, `grow` makes room for more, `rearrange` moves the rows that are left to a
smaller store. Each is compiled once for each of its shapes, whatever the settings of sampling.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignjax.core.loops import turning
from alignjax.core.types import Params
from alignjax.generate.sample import Truncation, sample_token
from alignjax.models import Model
from alignjax.models.decoding import Own, Prompts, read_prompts, read_tokens
from alignjax.models.kernels.decode import Seats
from alignjax.models.kv import like
from alignjax.sharding.mesh import BATCH_AXES, batch_shards

STEPS = 64
"""Tokens that one call of `advance` adds to a row at most."""
NO_TOKEN, ANY_TOKEN, NEVER = -1, -2, -3
"""What is no id: before the first token of a row; in a stop sequence, whatever comes before it; and
in the place of a stop sequence that there is not."""


class Limits(NamedTuple):
    """What may change from call to call without a new compilation."""

    temperature: Array
    """[] float32."""
    truncation: Truncation
    stops: Array
    """[S, Q] int32; each a sequence of tokens, with ANY_TOKEN before it; unused ones are NEVER."""
    penalty: Array | None
    """[] float32; of repetition. None, here and below: a program without it."""
    is_banned: Array | None
    """[V] bool."""
    forced: Array | None
    """[F] int32; filled up with NO_TOKEN."""


class Rows(NamedTuple):
    """N slots, each with a completion in the making, a finished one, or none."""

    keys: Array
    """[N, 2] uint32; a row's samples depend on its key alone."""
    num_tokens: Array
    """[N] int32; drawn so far."""
    max_tokens: Array
    """[N] int32."""
    is_done: Array
    """[N] bool; True on slots without a row too."""
    is_stopped: Array
    """[N] bool; a stop token or sequence ended it."""
    recent: Array
    """[N, Q] int32; the last tokens, the newest last."""
    is_seen: Array | None
    """[N, V] bool; tokens of the prompt and of the completion, where repetition is penalised."""
    seats: Seats
    own: Own


class Entry(NamedTuple):
    """What `admit` gives to slots; anything in the others."""

    is_new: Array
    """[N] bool."""
    keys: Array
    max_tokens: Array
    is_seen: Array | None
    seats: Seats
    """Of all rows, old and new."""


def _on_batch(tree: Any, mesh: Mesh | None, axis: int) -> Any:
    """Splits this axis of each array over the devices, if it divides."""
    if mesh is None:
        return tree
    shards = 1
    for name in BATCH_AXES:
        shards *= mesh.shape[name]

    def split(array: Array) -> Array:
        if array.ndim <= axis or array.shape[axis] % shards:
            return array
        free = PartitionSpec.UNCONSTRAINED
        spec = [BATCH_AXES if i == axis else free for i in range(array.ndim)]
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(split, tree)


def _spread(rows: Rows, mesh: Mesh | None) -> Rows:
    own = rows.own._replace(k=_on_batch(rows.own.k, mesh, 1), v=_on_batch(rows.own.v, mesh, 1))
    return rows._replace(own=own)


def _draw(logits: Array, rows: Rows, limits: Limits, is_live: Array) -> tuple[Rows, Array, Array]:
    """The next token of each live row: tokens [N] int32 and logps [N] float32, 0 in other rows."""
    uniform = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(
        rows.keys, rows.num_tokens
    )
    shaped, is_seen = logits, rows.is_seen
    if limits.penalty is not None:
        penalised = jnp.where(shaped > 0, shaped / limits.penalty, shaped * limits.penalty)
        shaped = jnp.where(is_seen, penalised, shaped)
    if limits.is_banned is not None:
        shaped = jnp.where(limits.is_banned, -jnp.inf, shaped)
    tokens, logps = sample_token(shaped, uniform, limits.temperature, limits.truncation)
    if limits.forced is not None:
        forced = jnp.take(limits.forced, rows.num_tokens, mode="fill", fill_value=NO_TOKEN)
        is_free = forced == NO_TOKEN
        tokens = jnp.where(is_free, tokens, forced)
        logps = jnp.where(is_free, logps, _logps(logits, tokens, limits.temperature))
    if is_seen is not None:
        number = jnp.arange(tokens.shape[0])
        is_seen = is_seen.at[number, tokens].set(is_seen[number, tokens] | is_live)
    recent = jnp.concatenate([rows.recent[:, 1:], tokens[:, None]], axis=1)
    recent = jnp.where(is_live[:, None], recent, rows.recent)
    is_match = (recent[:, None] == limits.stops) | (limits.stops == ANY_TOKEN)
    is_stopped = is_live & jnp.any(jnp.all(is_match, axis=-1), axis=-1)
    num_tokens = rows.num_tokens + is_live
    rows = rows._replace(
        num_tokens=num_tokens,
        is_done=rows.is_done | is_stopped | (num_tokens >= rows.max_tokens),
        is_stopped=rows.is_stopped | is_stopped,
        recent=recent,
        is_seen=is_seen,
    )
    return rows, jnp.where(is_live, tokens, 0), jnp.where(is_live, logps, 0.0)


def _logps(logits: Array, tokens: Array, temperature: Array) -> Array:
    """[N, V], [N] -> [N] float32, nats; at temperature 0 those of temperature 1."""
    logps = jax.nn.log_softmax(logits / jnp.where(temperature == 0, 1.0, temperature), axis=-1)
    return jnp.take_along_axis(logps, tokens[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames="prompts")
def read_into(
    params: Params, prompts: Prompts, tokens: Array, lengths: Array, places: Array,
    *, model: Model, mesh: Mesh | None,
) -> Prompts:  # fmt: skip
    """Reads prompts and puts them in the places of others.

    Args:
      tokens: [R, P] int32, right-padded; lengths: [R] int32, at least 1.
      places: [R] int32; B where a prompt only fills the call up.
    """
    read = read_prompts(model, params, _on_batch(tokens, mesh, 0), lengths)
    put = lambda old, new: old.at[:, places].set(new)  # noqa: E731
    return Prompts(
        k=_on_batch(jax.tree.map(put, prompts.k, like(prompts.k, read.k, 3)), mesh, 1),
        v=_on_batch(jax.tree.map(put, prompts.v, like(prompts.v, read.v, 4)), mesh, 1),
        lengths=prompts.lengths.at[places].set(read.lengths),
        hidden=prompts.hidden.at[places].set(read.hidden),
    )


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames="rows")
def admit(
    params: Params, prompts: Prompts, rows: Rows, entry: Entry, limits: Limits,
    *, model: Model, mesh: Mesh | None,
) -> tuple[Rows, Array, Array]:  # fmt: skip
    """New rows take their slots, and their first tokens [N] with log-probs [N] are drawn."""
    is_new = entry.is_new
    rows = rows._replace(
        keys=jnp.where(is_new[:, None], entry.keys, rows.keys),
        num_tokens=jnp.where(is_new, 0, rows.num_tokens),
        max_tokens=jnp.where(is_new, entry.max_tokens, rows.max_tokens),
        is_done=rows.is_done & ~is_new,
        is_stopped=rows.is_stopped & ~is_new,
        recent=jnp.where(is_new[:, None], NO_TOKEN, rows.recent),
        is_seen=(
            None
            if entry.is_seen is None
            else jnp.where(is_new[:, None], entry.is_seen, rows.is_seen)
        ),
        seats=entry.seats,
    )
    num_each = entry.seats.rows.shape[0] // prompts.lengths.shape[0]
    hidden = prompts.hidden[entry.seats.of_row // num_each]
    rows, tokens, logps = _draw(model.logits(params, hidden), rows, limits, is_new)
    return _spread(rows, mesh), tokens, logps


@functools.partial(jax.jit, static_argnames=("model", "mesh"), donate_argnames="rows")
def advance(
    params: Params, prompts: Prompts, rows: Rows, is_empty: Array, limits: Limits,
    num_steps: Array, min_live: Array, *, model: Model, mesh: Mesh | None,
) -> tuple[Rows, Array, Array]:  # fmt: skip
    """Adds up to `num_steps` tokens to each row that is not done.

    Args:
      is_empty: [N] bool; slots without a row, or with one that the caller has ended.
      num_steps: [] int32, at most STEPS.
      min_live: [] int32; ends as soon as so few rows are left to work on.
    Returns:
      rows; tokens [N, STEPS] int32 and logps [N, STEPS] float32 in the order of time, 0 where a row
      was done.
    """
    num_rows = rows.num_tokens.shape[0]

    def go_on(state: tuple[Array, Rows, Array, Array]) -> Array:
        step, rows, _, _ = state
        return (step < num_steps) & (jnp.sum(~rows.is_done) > min_live)

    def step_on(state: tuple[Array, Rows, Array, Array]) -> tuple[Array, Rows, Array, Array]:
        step, rows, tokens, logps = state
        last, num_before = rows.recent[:, -1], rows.num_tokens - 1
        hidden, own = read_tokens(model, params, last, num_before, prompts, rows.own, rows.seats)
        rows = rows._replace(own=own)
        rows, token, logp = _draw(model.logits(params, hidden), rows, limits, ~rows.is_done)
        return step + 1, rows, tokens.at[:, step].set(token), logps.at[:, step].set(logp)

    rows = rows._replace(is_done=rows.is_done | is_empty)
    tokens = jnp.zeros((num_rows, STEPS), jnp.int32)
    state = (jnp.int32(0), rows, tokens, tokens.astype(jnp.float32))
    with turning(STEPS):
        _, rows, tokens, logps = jax.lax.while_loop(go_on, step_on, state)
    return _spread(rows, mesh), tokens, logps


@functools.partial(jax.jit, static_argnames=("capacity", "mesh"))
def grow(rows: Rows, *, capacity: int, mesh: Mesh | None) -> Rows:
    """The same rows, with room for `capacity` tokens of their own; at least what it was."""
    own, room = rows.own, capacity - rows.own.capacity
    # The oldest first: then the next slot is the first of the new ones.
    k = jax.tree.map(lambda array: _extended(array, own.slot, room, array.ndim - 1), own.k)
    v = jax.tree.map(lambda array: _extended(array, own.slot, room, 3), own.v)
    return _spread(rows._replace(own=Own(k, v, jnp.full_like(own.slot, own.capacity))), mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def rearrange(
    prompts: Prompts, rows: Rows, source: Array, prompt_source: Array, seats: Seats,
    *, mesh: Mesh | None,
) -> tuple[Prompts, Rows]:  # fmt: skip
    """Some of the rows and prompts, in other slots.

    Args:
      source: [N'] int32, the slot that a row comes from, on the same device; -1 leaves the new slot
        empty.
      prompt_source: [B'] int32, as source; anything where there is none.
      seats: of the rows in their new slots.
    """

    def move(array: Array, axis: int = 0) -> Array:
        return _taken(array, source, axis, mesh)

    def move_prompt(array: Array, axis: int = 0) -> Array:
        return _taken(array, prompt_source, axis, mesh)

    own = rows.own
    rows = Rows(
        keys=move(rows.keys),
        num_tokens=move(rows.num_tokens),
        max_tokens=move(rows.max_tokens),
        is_done=move(rows.is_done) | (source < 0),
        is_stopped=move(rows.is_stopped),
        recent=move(rows.recent),
        is_seen=None if rows.is_seen is None else move(rows.is_seen),
        seats=seats,
        own=Own(*jax.tree.map(lambda x: move(x, 1), (own.k, own.v)), own.slot),
    )
    k, v = jax.tree.map(lambda x: move_prompt(x, 1), (prompts.k, prompts.v))
    prompts = Prompts(k, v, move_prompt(prompts.lengths), move_prompt(prompts.hidden))
    return prompts, _spread(rows, mesh)


def _taken(array: Array, source: Array, axis: int, mesh: Mesh | None) -> Array:
    """`array` at `source` along an axis; anything where that is -1.

    Where the axis is split over devices, each takes of its own part: a program that may take from
    anywhere gathers the keys and values of all devices on each.
    """
    shards = 1 if mesh is None else batch_shards(mesh)
    if array.shape[axis] % shards or len(source) % shards:  # Not split: see `_on_batch`.
        shards = 1
    size = array.shape[axis] // shards
    parts = array.reshape(*array.shape[:axis], shards, size, *array.shape[axis + 1 :])
    places = source.reshape(shards, -1) - size * jnp.arange(shards)[:, None]
    take = jax.vmap(functools.partial(jnp.take, axis=axis, mode="clip"), (axis, 0), axis)
    taken = take(_on_batch(parts, mesh, axis), places)
    return taken.reshape(*array.shape[:axis], len(source), *array.shape[axis + 1 :])


def _extended(ring: Array, slot: Array, room: int, axis: int) -> Array:
    widths = [(0, 0)] * ring.ndim
    widths[axis] = (0, room)
    return jnp.pad(jnp.roll(ring, -slot, axis=axis), widths)


def num_compilations() -> int:
    """How many programs this process has compiled to generate."""
    return sum(f._cache_size() for f in (read_into, admit, advance, grow, rearrange))
