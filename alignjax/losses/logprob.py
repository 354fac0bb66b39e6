"""Hidden states and an unembedding -> log-probs of tokens; the logits of a batch never exist whole.

That holds beyond ROWS_PER_CHUNK rows (B * T of them) and 8 time steps: so much a chunk of the
default size may hold.

Each row's targets are moved to its front, then a loop over chunks of the time axis makes the logits
of one chunk at a time, forward and (again) backward, and stops after the last chunk that holds a
target in any row. Prompt and padding therefore never reach the unembedding, but for what levels the
rows. Rows are never mixed, so a batch axis sharded over devices stays where it is.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.core.precision import matmul_precision

ROWS_PER_CHUNK = 1024
"""Default B * chunk_size: enough rows to keep a matrix unit busy and to pay for one pass over the
gradient of the unembedding, at 4 KiB of float32 logits for each entry of the vocabulary."""
_SMALLEST_CHUNK = 8


class TokenLogps(NamedTuple):
    """What the policy thought of the tokens that are there. Entry t is about token t."""

    logps: Array
    """[B, T] float32, nats; log p(tokens[t] | hidden[t - 1]); exactly 0 off mask and at t = 0."""
    entropies: Array | None
    """[B, T] float32, nats; entropy of the distribution token t was predicted from, 0 where `logps`
    is; None unless asked for."""
    is_argmax: Array
    """[B, T] bool; True where no other token was more likely (ties count). No gradient."""


def default_chunk_size(num_rows: int) -> int:
    """Time steps of so many rows that make about ROWS_PER_CHUNK together; at least 8."""
    return max(ROWS_PER_CHUNK // num_rows, _SMALLEST_CHUNK)


def next_token_logps(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    mask: Array,
    *,
    temperature: Array | float = 1.0,
    chunk_size: int | None = None,
    with_entropy: bool = False,
) -> TokenLogps:
    """Log p(tokens[t] | hidden[t - 1]): z[tokens[t]] - logsumexp(z), z the logits / temperature.

    The shift by one happens here and nowhere else.

    Args:
      hidden: [B, T, D] float32 or bfloat16; final-normed. Carries gradient.
      unembedding: [D, V] float32 or bfloat16. Carries gradient, summed in float32.
      tokens: [B, T] int32, 0 <= tokens < V under the mask.
      mask: [B, T] bool; True where the token is a target. Elsewhere tokens, and hidden states that
        predict no target, may be anything, even nan. Never True on the first token of a sequence
        or segment: it would be predicted from the segment before; mask[:, 0], which has no
        predictor, is ignored here, but `losses.token_mean` and the others would count it.
      temperature: [] float or a number, dimensionless, > 0; divides the logits. Traced; gradient
        stopped.
      chunk_size: time steps whose logits exist at once, B * chunk_size * V float32 in all; by
        default about ROWS_PER_CHUNK / B, at least 8. Where B is spread over devices, pass
        `default_chunk_size` of the rows on one of them: each chunk sums the gradient of the
        unembedding over all devices.
      with_entropy: whether to compute entropies, which carry gradient.
    Returns:
      TokenLogps of [B, T] arrays. Logits, log-softmax and sums are float32 whatever the inputs.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if B, T or chunk_size < 1, or temperature is a Python or NumPy number not > 0.
    Source: the chain rule of probability; logits recomputed in blocks: arXiv:2411.09009.
    """
    chex.assert_rank([hidden, unembedding, tokens, mask, temperature], [3, 2, 2, 2, 0])
    chex.assert_equal_shape_prefix([hidden, tokens, mask], 2)
    chex.assert_equal(hidden.shape[2], unembedding.shape[0])
    chex.assert_type([tokens, mask], [jnp.int32, bool])
    for name, x in (("hidden", hidden), ("unembedding", unembedding)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise AssertionError(f"{name} is {x.dtype}: expected float32 or bfloat16")
    if not mask.size:
        raise ValueError(f"mask is {mask.shape}: expected at least one row and one time step")
    if isinstance(temperature, int | float | np.generic | np.ndarray) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected > 0 (greedy is scored at 1.0)")
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0])
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    tau = jnp.asarray(temperature, jnp.float32)
    plan = _plan(mask, min(chunk_size, hidden.shape[1]))
    return _compiled(with_entropy, hidden, unembedding, tokens, tau, plan)


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
    """An einsum in the type of `a`, accumulated in float32, at the precision of the sampler's."""
    return jnp.einsum(
        spec,
        a,
        b.astype(a.dtype),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _logits(hidden: Array, unembedding: Array) -> Array:
    """[B, C, D] x [D, V] -> [B, C, V] float32."""
    return _multiply("bcd,dv->bcv", hidden, unembedding)


def _terms(z: Array, targets: Array, tau: Array, with_entropy: bool) -> TokenLogps:
    """Logits [B, C, V] and targets [B, C] -> the terms of one chunk, each [B, C]."""
    # A comparison, not a gather: where V is sharded it needs no communication but a sum.
    is_target = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) == targets[..., None]
    z_target = jnp.sum(jnp.where(is_target, z, 0.0), axis=-1)
    z_max = jax.lax.stop_gradient(jnp.max(z, axis=-1))
    is_argmax = z_target >= z_max  # before any arithmetic, which the compiler may round two ways
    z = (z - z_max[..., None]) / tau
    exp_z = jnp.exp(z)
    total = jnp.sum(exp_z, axis=-1)
    log_total = jnp.log(total)
    entropies = log_total - jnp.sum(exp_z * z, axis=-1) / total if with_entropy else None
    return TokenLogps((z_target - z_max) / tau - log_total, entropies, is_argmax)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(
    with_entropy: bool, hidden: Array, unembedding: Array, tokens: Array, tau: Array, plan: _Plan
) -> TokenLogps:
    def chunk(i: Array, outs: TokenLogps) -> TokenLogps:
        order, live = plan.order[i], plan.live[i]
        z = _logits(_take(hidden, order - 1, live), unembedding)
        terms = _terms(z, _take(tokens, order, live), tau, with_entropy)
        return jax.tree.map(lambda out, term: out.at[i].set(term), outs, terms)

    shape = plan.order.shape
    zeros = jnp.zeros(shape, jnp.float32)
    outs = TokenLogps(zeros, zeros if with_entropy else None, jnp.zeros(shape, bool))
    # Bounded by data, not by shape: chunks without a target cost nothing.
    outs = jax.lax.fori_loop(0, plan.num_chunks, chunk, outs)
    return jax.tree.map(lambda x: _join(x, plan), outs)


def _forward(
    with_entropy: bool, hidden: Array, unembedding: Array, tokens: Array, tau: Array, plan: _Plan
) -> tuple[TokenLogps, tuple[Array, Array, Array, Array, _Plan]]:
    outs = _token_logps(with_entropy, hidden, unembedding, tokens, tau, plan)
    return outs, (hidden, unembedding, tokens, tau, plan)


def _backward(
    with_entropy: bool, saved: tuple[Array, Array, Array, Array, _Plan], grads: TokenLogps
) -> tuple[Array, Array, None, None, None]:
    hidden, unembedding, tokens, tau, plan = saved
    dtype = hidden.dtype

    def chunk(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        d_slots, d_unembedding = sums
        order, live = plan.order[i], plan.live[i]
        h = _take(hidden, order - 1, live)
        targets = _take(tokens, order, live)

        def differentiable(z: Array) -> tuple[Array, Array | None]:
            return _terms(z, targets, tau, with_entropy)[:2]

        _, pull = jax.vjp(differentiable, _logits(h, unembedding))
        (d_z,) = pull(jax.tree.map(lambda g: _take(g, order, live), tuple(grads[:2])))
        d_z = d_z.astype(dtype)
        d_h = _multiply("bcv,dv->bcd", d_z, unembedding)
        d_unembedding += _multiply("bcd,bcv->dv", h, d_z)
        return d_slots.at[i].set(d_h.astype(dtype)), d_unembedding

    d_slots = jnp.zeros((*plan.order.shape, hidden.shape[2]), dtype)
    d_unembedding = jnp.zeros(unembedding.shape, jnp.float32)
    d_slots, d_unembedding = jax.lax.fori_loop(0, plan.num_chunks, chunk, (d_slots, d_unembedding))
    d_tokens = _join(d_slots, plan)  # by the token predicted: one step after its predictor
    d_hidden = jnp.roll(d_tokens, -1, axis=1)
    return d_hidden, d_unembedding.astype(unembedding.dtype), None, None, None


_token_logps.defvjp(_forward, _backward)
# The bodies of the loops are new at each call: without this, calls outside jit compile each time.
_compiled = jax.jit(_token_logps, static_argnums=0)
