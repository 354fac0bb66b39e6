"""Hidden states and an unembedding -> log-probs of tokens, statistics of their distributions."""

from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core.precision import matmul_precision
from alignjax.losses import vocabulary


class TokenLogps(NamedTuple):
    """What the policy thought of the tokens that are there. Entry t is about token t.

    All are exactly 0 off mask and at t = 0. Floats are float32, and carry gradient. Those that are
    not asked for are None.
    """

    logps: Array
    """[B, T], nats; log p(tokens[t] | hidden[t - 1])."""
    entropies: Array | None
    """[B, T], nats; entropy of the distribution p that token t was predicted from."""
    is_argmax: Array
    """[B, T] bool; True where no other token was more likely (ties count). No gradient."""
    log_normalizers: Array | None = None
    """[B, T], nats; logsumexp of the logits as they enter the softmax, see `losses.z_loss`."""
    mean_logps: Array | None = None
    """[B, T], nats; mean over the vocabulary of log p, see `losses.label_smoothed`."""
    log_collisions: Array | None = None
    """[B, T], nats; log sum_v p_v^2, the log-probability that two draws agree."""
    top_logps: Array | None = None
    """[B, T, K], nats; log p of the K most likely tokens, the most likely first."""
    top_ids: Array | None = None
    """[B, T, K] int32; those tokens; of equally likely ones the lower id goes first."""


def next_token_logps(
    hidden: Array,
    unembedding: Array,
    tokens: Array,
    mask: Array,
    *,
    temperature: Array | float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    with_entropy: bool = False,
    with_log_normalizer: bool = False,
    with_mean_logp: bool = False,
    with_log_collision: bool = False,
    top_k: int = 0,
) -> TokenLogps:
    """Log p(tokens[t] | hidden[t - 1]): z[tokens[t]] - logsumexp(z), z the logits / temperature.

    Args:
      hidden: [B, T, D] float32 or bfloat16; final-normed. Carries gradient.
      unembedding: [D, V] float32 or bfloat16. Carries gradient, summed in float32.
      tokens: [B, T] int32, 0 <= tokens < V (or vocab_size) under the mask.
      mask: [B, T] bool; True where the token is a target. Elsewhere tokens, and hidden states that
        predict no target, may be anything, even nan. Never True on the first token of a sequence
        or segment: it would be predicted from the segment before; mask[:, 0], which has no
        predictor, is ignored here, but `losses.token_mean` and the others would count it.
      temperature: [] float or a number, dimensionless, > 0; divides the logits. Traced; gradient
        stopped.
      soft_cap: logits, > 0; logits z become soft_cap * tanh(z / soft_cap), before the temperature.
      vocab_size: entries of the unembedding, which must be finite, from here on are padding: their
        probability is 0, no mean counts them and they get no gradient.
      chunk_size: time steps whose logits exist at once, B * chunk_size * V float32 in all; by
        default about ROWS_PER_CHUNK / B, at least 8. Where B is spread over devices, pass
        `default_chunk_size` of the rows on one of them: each chunk sums the gradient of the
        unembedding over all devices.
      with_entropy, with_log_normalizer, with_mean_logp, with_log_collision: what else to compute.
      top_k: how many of the most likely tokens to return. This alone may gather logits that are
        spread over devices, by rows or vocabulary, a chunk at a time: the compiler's top-k does.
    Returns:
      TokenLogps of [B, T] arrays. Logits, log-softmax and sums are float32 whatever the inputs
      (float64 if hidden is).
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if B, T or chunk_size < 1, temperature is a Python or NumPy number not > 0,
        soft_cap is not > 0, vocab_size is not in 1 to V or top_k not in 0 to vocab_size.
    Source: the chain rule of probability; logits recomputed in blocks: arXiv:2411.09009; soft cap:
      arXiv:2408.00118 sec. 2.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_type(tokens, jnp.int32)
    readout = vocabulary.readout(unembedding, soft_cap, vocab_size)
    if not 0 <= top_k <= readout.num_real(unembedding):
        raise ValueError(f"top_k={top_k}: expected 0 to {readout.num_real(unembedding)}")
    statistics = _Statistics(
        readout, with_entropy, with_log_normalizer, with_mean_logp, with_log_collision, top_k
    )
    tau = vocabulary.divisor(temperature, hidden)
    return vocabulary.by_token(
        statistics, hidden, unembedding, tokens, tau, mask, chunk_size=chunk_size
    )


@dataclass(frozen=True)
class _Statistics:
    """Logits [B, C, V] and targets [B, C] -> the TokenLogps of one chunk."""

    readout: vocabulary.Readout
    with_entropy: bool
    with_log_normalizer: bool
    with_mean_logp: bool
    with_log_collision: bool
    top_k: int

    def __call__(self, z: Array, targets: Array, tau: Array) -> TokenLogps:
        readout = self.readout
        # A comparison, not a gather: where V is sharded it needs no communication but a sum.
        is_target = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) == targets[..., None]
        z_target = jnp.sum(jnp.where(is_target, z, 0.0), axis=-1)
        z_max = readout.largest(z)
        shifted = readout.shifted(z, tau)
        exp_z = jnp.exp(shifted)
        total = jnp.sum(exp_z, axis=-1)
        log_total = jnp.log(total)
        out = TokenLogps(
            logps=readout.above(z_target, z_max, tau) - log_total,
            entropies=None,
            # Before any arithmetic, which the compiler may round two ways.
            is_argmax=z_target >= z_max,
        )
        if self.with_entropy:
            # As a product of matrices: a sum of products takes XLA ten times as long on a CPU where
            # B is 1.
            weighted = jnp.einsum(
                "bcv,bcv->bc", exp_z, shifted, precision=matmul_precision(exp_z.dtype)
            )
            out = out._replace(entropies=log_total - weighted / total)
        if self.with_log_normalizer:
            # The gradient by the largest logit cancels: it may stay stopped.
            out = out._replace(log_normalizers=readout.capped(z_max) / tau + log_total)
        if self.with_mean_logp:
            mean = jnp.sum(readout.only_real(shifted, 0.0), axis=-1) / readout.num_real(z)
            out = out._replace(mean_logps=mean - log_total)
        if self.with_log_collision:
            squares = jnp.log(jnp.sum(exp_z**2, axis=-1))
            out = out._replace(log_collisions=squares - 2.0 * log_total)
        if self.top_k:
            largest, ids = jax.lax.top_k(readout.only_real(z, -jnp.inf), self.top_k)
            logps = readout.above(largest, z_max[..., None], tau) - log_total[..., None]
            out = out._replace(top_logps=logps, top_ids=ids)
        return out
