"""Hidden states and an unembedding -> any function of each token's logits, which never exist whole.

That holds beyond ROWS_PER_CHUNK rows (B * T of them) and 8 time steps: so much a chunk of the
default size may hold.

Each row's targets are moved to its front, then a loop over chunks of the time axis makes the logits
of one chunk at a time, forward and, beyond MOST_KEPT of them, again backward, and stops after the
last chunk that holds a target in any row. Prompt and padding therefore never reach the unembedding,
but for what levels the rows. Rows are never mixed, so a batch axis sharded over devices stays where
it is.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.dtypes import float0

from alignjax.core.loops import turning
from alignjax.core.masked import at_least_float32
from alignjax.core.precision import matmul_precision

ROWS_PER_CHUNK = 1024
"""Default B * chunk_size: enough rows to keep a matrix unit busy and to pay for one pass over the
gradient of the unembedding, at 4 KiB of float32 logits for each entry of the vocabulary."""
_SMALLEST_CHUNK = 8
MOST_KEPT = 2**27
"""Logits of all chunks, on all devices together, that wait for the backward pass at most: 512 MiB
of float32, which spare it one of four products with the unembedding."""
_NEVER = -1e4
"""Nats; exp of it is exactly 0, and 0 times it is 0, as 0 times -inf is not."""


def default_chunk_size(num_rows: int) -> int:
    """Time steps of so many rows that make about ROWS_PER_CHUNK together; at least 8."""
    return max(ROWS_PER_CHUNK // num_rows, _SMALLEST_CHUNK)


class Terms(Protocol):
    """What to compute from the logits of one chunk. Static: hashable, and equal by value."""

    def __call__(self, z: Array, inputs: Any, constants: Any, /) -> Any:
        """Logits z [B, C, V] and inputs [B, C, ...] -> a tree of [B, C, ...] arrays.

        Floats among them are differentiated by z, and by nothing else.
        """


@dataclass(frozen=True)
class Readout:
    """How logits become a distribution; padding, entries from `vocab_size` on, has no part in it.

    Attributes:
      soft_cap: logits; z becomes soft_cap * tanh(z / soft_cap) before the temperature divides it.
      vocab_size: entries that are real; all if None.
    """

    soft_cap: float | None = None
    vocab_size: int | None = None

    def only_real(self, z: Array, otherwise: float) -> Array:
        """z [..., V] with `otherwise` in place of padding."""
        if self.vocab_size is None or self.vocab_size == z.shape[-1]:
            return z
        ids = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
        return jnp.where(ids < self.vocab_size, z, otherwise)

    def num_real(self, z: Array) -> int:
        return z.shape[-1] if self.vocab_size is None else self.vocab_size

    def largest(self, z: Array) -> Array:
        """[..., V] -> [...]: the largest logit, as it came. No gradient."""
        return jax.lax.stop_gradient(jnp.max(self.only_real(z, -jnp.inf), axis=-1))

    def capped(self, z: Array) -> Array:
        return z if self.soft_cap is None else self.soft_cap * jnp.tanh(z / self.soft_cap)

    def above(self, z: Array, floor: Array, tau: Array) -> Array:
        """Logits as they enter the softmax, less what `floor` becomes there."""
        return (self.capped(z) - self.capped(floor)) / tau

    def shifted(self, z: Array, tau: Array) -> Array:
        """[..., V] -> [..., V]: logits as they enter the softmax, less the largest."""
        return self.only_real(self.above(z, self.largest(z)[..., None], tau), _NEVER)

    def log_softmax(self, z: Array, tau: Array) -> Array:
        """[..., V] -> [..., V] nats; finite in the padding, where its exponential is 0."""
        z = self.shifted(z, tau)
        return z - jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))


def readout(unembedding: Array, soft_cap: float | None, vocab_size: int | None) -> Readout:
    """The options of a caller, checked."""
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: expected > 0, or None for none")
    if vocab_size is not None and not 1 <= vocab_size <= unembedding.shape[-1]:
        raise ValueError(
            f"vocab_size={vocab_size}: expected 1 to {unembedding.shape[-1]}, the entries of the "
            "unembedding"
        )
    return Readout(soft_cap, vocab_size)


def divisor(temperature: Array | float, hidden: Array) -> Array:
    """The temperature, checked, in the type of the logits of these hidden states."""
    chex.assert_rank(temperature, 0)
    if isinstance(temperature, int | float | np.generic | np.ndarray) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected > 0 (greedy is scored at 1.0)")
    return jnp.asarray(temperature, at_least_float32(hidden))


def by_token(
    terms: Terms,
    hidden: Array,
    unembedding: Array,
    inputs: Any,
    constants: Any,
    mask: Array,
    *,
    chunk_size: int | None = None,
) -> Any:
    """Terms of the logits hidden[t - 1] @ unembedding, for each token t under the mask.

    The shift by one happens here and nowhere else.

    Args:
      terms: what to compute from the logits, at least float32, of a chunk.
      hidden: [B, T, D] float32 or bfloat16 (float64 is kept). Carries gradient. May be anything
        where it predicts no target, even nan.
      unembedding: [D, V] of the same types. Carries gradient, summed in at least float32.
      inputs: tree of [B, T, ...] arrays about token t, given to `terms` for the chunk, or 0 where
        there is no target; may be anything off mask. No gradient.
      constants: tree of arrays given to `terms` as they are. No gradient.
      mask: [B, T] bool; True where the token is a target. mask[:, 0], which has no predictor, is
        ignored.
      chunk_size: time steps whose logits exist at once, B * chunk_size * V float32 in all; by
        default about ROWS_PER_CHUNK / B, at least 8. Where B is spread over devices, pass
        `default_chunk_size` of the rows on one of them: each chunk sums the gradient of the
        unembedding over all devices.
    Returns:
      What `terms` does, by token: [B, T, ...], exactly 0 off mask and at t = 0.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if B, T or chunk_size < 1.
    """
    check_states("hidden", hidden, "unembedding", unembedding)
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape_prefix([hidden, mask, *jax.tree.leaves(inputs)], 2)
    if not mask.size:
        raise ValueError(f"mask is {mask.shape}: expected at least one row and one time step")
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    plan = _plan(mask, min(chunk_size, hidden.shape[1]))
    return _compiled(terms, hidden, unembedding, inputs, constants, plan)


def check_states(name: str, hidden: Array, unembedding_name: str, unembedding: Array) -> None:
    """AssertionError unless these are [B, T, D] and [D, V] of types that are multiplied here."""
    chex.assert_rank([hidden, unembedding], [3, 2])
    chex.assert_equal(hidden.shape[2], unembedding.shape[0])
    for which, x in ((name, hidden), (unembedding_name, unembedding)):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
            raise AssertionError(f"{which} is {x.dtype}: expected float32 or bfloat16")


class _Plan(NamedTuple):
    """Where each target goes: to slot s of its row, chunk s // C of n, in the order of time."""

    order: Array
    """[n, B, C] int32; the token whose term each slot computes: targets first, the rest at will."""
    live: Array
    """[n, B, C] bool; True where the slot holds a target."""
    slots: Array
    """[B, T] int32; the inverse of `order`: the slot that holds token t."""
    on: Array
    """[B, T] bool; True where token t is a target."""
    num_chunks: Array
    """[] int32; chunks that hold a target in any row."""


def _plan(mask: Array, size: int) -> _Plan:
    """Mask [B, T] -> the targets of each row at its front, in chunks of `size`."""
    on = mask & (jnp.arange(mask.shape[1]) > 0)
    order = jnp.argsort(~on, axis=1, stable=True).astype(jnp.int32)
    longest = jnp.max(jnp.sum(on, axis=1, dtype=jnp.int32))
    return _Plan(
        order=_split(order, size),
        live=_split(jnp.take_along_axis(on, order, axis=1), size),
        slots=jnp.argsort(order, axis=1).astype(jnp.int32),
        on=on,
        num_chunks=(longest + size - 1) // size,
    )


def _split(x: Array, size: int) -> Array:
    """[B, T] -> [n, B, size], with zeros after the end."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
    return x.reshape(x.shape[0], -1, size).swapaxes(0, 1)


def _join(x: Array, plan: _Plan) -> Array:
    """[n, B, C, ...] by slot -> [B, T, ...] by token, 0 where there is no target."""
    x = x.swapaxes(0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return _take(x, plan.slots, plan.on)


def _take(x: Array, index: Array, where: Array) -> Array:
    """x [B, T, ...] at times `index` [B, C], or 0 off `where`: a nan there must not spread."""
    trailing = (slice(None), slice(None), *[None] * (x.ndim - 2))
    return jnp.where(
        where[trailing], jnp.take_along_axis(x, index[trailing], axis=1), jnp.zeros((), x.dtype)
    )


def _multiply(spec: str, a: Array, b: Array) -> Array:
    """An einsum in the type of `a`, summed in float32 at least, at the sampler's precision."""
    return jnp.einsum(
        spec,
        a,
        b.astype(a.dtype),
        precision=matmul_precision(a.dtype),
        preferred_element_type=at_least_float32(a),
    )


def logits(hidden: Array, unembedding: Array) -> Array:
    """[B, C, D] x [D, V] -> [B, C, V], at least float32."""
    return _multiply("bcd,dv->bcv", hidden, unembedding)


def _floats(tree: Any) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def _over_chunks(
    terms: Terms,
    hidden: Array,
    unembedding: Array,
    inputs: Any,
    constants: Any,
    plan: _Plan,
    *,
    keeps_logits: bool,
) -> tuple[Any, Array | None]:
    """Terms by token, and the logits [n, B, C, V] of all chunks if they are kept."""

    def of_chunk(i: Array) -> tuple[Any, Array | None]:
        order, live = plan.order[i], plan.live[i]
        z = logits(_take(hidden, order - 1, live), unembedding)
        here = jax.tree.map(lambda x: _take(x, order, live), inputs)
        return terms(z, here, constants), z if keeps_logits else None

    def chunk(i: Array, outs: Any) -> Any:
        return jax.tree.map(lambda out, term: out.at[i].set(term), outs, of_chunk(i))

    n = plan.order.shape[0]
    shapes = jax.eval_shape(of_chunk, plan.num_chunks)
    outs = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), shapes)
    # Bounded by data, not by shape: chunks without a target cost nothing.
    with turning(n):
        outs, kept = jax.lax.fori_loop(0, plan.num_chunks, chunk, outs)
    return jax.tree.map(lambda x: _join(x, plan), outs), kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_token(
    terms: Terms, hidden: Array, unembedding: Array, inputs: Any, constants: Any, plan: _Plan
) -> Any:
    arguments = terms, hidden, unembedding, inputs, constants, plan
    return _over_chunks(*arguments, keeps_logits=False)[0]


def _forward(
    terms: Terms, hidden: Array, unembedding: Array, inputs: Any, constants: Any, plan: _Plan
) -> tuple[Any, tuple[Array, Array, Any, Any, _Plan, Array | None]]:
    is_small = plan.order.size * unembedding.shape[1] <= MOST_KEPT
    arguments = hidden, unembedding, inputs, constants, plan
    outs, kept = _over_chunks(terms, *arguments, keeps_logits=is_small)
    return outs, (*arguments, kept)


def _backward(
    terms: Terms, saved: tuple[Array, Array, Any, Any, _Plan, Array | None], grads: Any
) -> tuple[Array, Array, None, None, None]:
    hidden, unembedding, inputs, constants, plan, kept = saved
    dtype = hidden.dtype
    by_result = [g for g in jax.tree.leaves(grads) if g.dtype != float0]

    def chunk(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        d_slots, d_unembedding = sums
        order, live = plan.order[i], plan.live[i]
        h = _take(hidden, order - 1, live)
        here = jax.tree.map(lambda x: _take(x, order, live), inputs)
        z = logits(h, unembedding) if kept is None else kept[i]
        _, pull = jax.vjp(lambda z: _floats(terms(z, here, constants)), z)
        (d_z,) = pull([_take(g, order, live) for g in by_result])
        d_z = d_z.astype(dtype)
        d_h = _multiply("bcv,dv->bcd", d_z, unembedding)
        d_unembedding += _multiply("bcd,bcv->dv", h, d_z)
        return d_slots.at[i].set(d_h.astype(dtype)), d_unembedding

    d_slots = jnp.zeros((*plan.order.shape, hidden.shape[2]), dtype)
    d_unembedding = jnp.zeros(unembedding.shape, at_least_float32(hidden))
    sums = d_slots, d_unembedding
    with turning(len(plan.order)):
        d_slots, d_unembedding = jax.lax.fori_loop(0, plan.num_chunks, chunk, sums)
    d_tokens = _join(d_slots, plan)  # by the token predicted: one step after its predictor
    d_hidden = jnp.roll(d_tokens, -1, axis=1)
    return d_hidden, d_unembedding.astype(unembedding.dtype), None, None, None


_by_token.defvjp(_forward, _backward)
# The bodies of the loops are new at each call: without this, calls outside jit compile each time.
_compiled = jax.jit(_by_token, static_argnums=0)
