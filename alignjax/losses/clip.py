"""Ratios and advantages -> policy-gradient surrogates, per token, never reduced.

Each takes log-probs of any level of `losses.ratio`, the same for both policies.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked
from alignjax.losses import segments
from alignjax.losses.ratio import capped_exp, token_log_ratio


class Surrogate(NamedTuple):
    """A surrogate loss and where its clip was at work, for metrics."""

    loss: Array
    """[B, T] float32, reward units, exactly 0 off mask. Carries gradient."""
    is_low: Array
    """[B, T] bool; clipped from below: by `ppo_clip` if r < 1 - clip_low and A < 0. False off
    mask."""
    is_high: Array
    """[B, T] bool; clipped from above: by `ppo_clip` if r > 1 + clip_high and A > 0. False off
    mask."""

    @property
    def is_clipped(self) -> Array:
        """[B, T] bool; clipped on either side."""
        return self.is_low | self.is_high


def ppo_clip(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Surrogate:
    """Per-token loss -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old_logp).

    Args:
      logp: [B, T] float32, nats; log-prob of the sampled token under the policy. Carries gradient.
      old_logp: [B, T] float32, nats; the same under the policy that sampled it. Gradient stopped.
      advantage: [B, T] float32, reward units. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
      clip_low, clip_high: dimensionless; trust-region width below and above r = 1.
    Returns:
      Surrogate: loss [B, T] float32, is_low and is_high [B, T] bool; is_clipped is their union.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= clip_low < 1 and clip_high >= 0.
    Source: arXiv:1707.06347 eq. 7; clip_high > clip_low: arXiv:2503.14476 sec. 3.1. We differ in
    one point: r stops at exp(20), so that no float overflows.
    """
    _check_widths(clip_low, clip_high)
    return _clipped(logp, old_logp, advantage, mask, 1 - clip_low, 1 + clip_high, math.inf)


def dual_clip(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual: float = 3.0,
) -> Surrogate:
    """Per-token loss of `ppo_clip`, but no larger than -dual A where A < 0.

    There `ppo_clip` has no bound: a token that the policy has made much more likely, and that was
    bad, outweighs all others. Arguments, result and errors as in `ppo_clip`; is_high is also True
    where r > dual and A < 0, where the gradient is 0 as well.

    Args:
      dual: dimensionless; the largest ratio that counts where A < 0.
    Raises:
      ValueError: unless dual > 1.
    Source: arXiv:1912.09729, dual-clip PPO.
    """
    _check_widths(clip_low, clip_high)
    if not dual > 1:
        raise ValueError(f"dual={dual}: expected the largest ratio where A < 0, > 1")
    return _clipped(logp, old_logp, advantage, mask, 1 - clip_low, 1 + clip_high, dual)


def cispo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Surrogate:
    """Per-token loss -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A logp.

    The weight is clipped, the gradient never: every token learns. Arguments, result and errors as
    in `ppo_clip`; is_low and is_high are where r is out of its range, whatever the advantage.

    Args:
      clip_low, clip_high: dimensionless; width of the range of weights below and above r = 1. A
        source that states the largest weight itself, M, means clip_high = M - 1. clip_low >= 1 is
        no bound, since r > 0.
    Raises:
      ValueError: unless clip_low >= 0 and clip_high >= 0.
    Source: arXiv:2506.13585 eq. 4-5, which has no lower bound and tunes the upper one, but gives no
    number; a largest weight of 5: arXiv:2510.13786.
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: expected both >= 0")
    logp, adv, ratio = _terms(logp, old_logp, advantage, mask)
    ratio = jax.lax.stop_gradient(ratio)
    weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return Surrogate(-weight * adv * logp, ratio < 1 - clip_low, ratio > 1 + clip_high)


def sapo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Surrogate:
    """Per-token loss -(4 / tau) sigmoid(tau (r - 1)) A, a clip without an edge.

    The slope by r is -A at r = 1 for any tau, and falls off on both sides. Arguments, result and
    errors as in `ppo_clip`; nothing is ever clipped.

    Args:
      tau_pos, tau_neg: dimensionless; how fast the slope falls off, where A > 0 and elsewhere.
    Raises:
      ValueError: unless tau_pos > 0 and tau_neg > 0.
    Source: arXiv:2511.20347 (SAPO), the gate f.
    """
    if not (tau_pos > 0 and tau_neg > 0):
        raise ValueError(f"tau_pos={tau_pos}, tau_neg={tau_neg}: expected both > 0")
    _, adv, ratio = _terms(logp, old_logp, advantage, mask)
    tau = jnp.where(adv > 0, tau_pos, tau_neg)
    return _unclipped(-(4 / tau) * jax.nn.sigmoid(tau * (ratio - 1)) * adv)


def reinforce(logp: Array, old_logp: Array, advantage: Array, mask: Array) -> Surrogate:
    """Per-token loss -A logp.

    Arguments, result and errors as in `ppo_clip`; nothing is ever clipped, and old_logp is not
    read: this is for tokens that the policy itself has just sampled.
    Source: R. J. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist
    Reinforcement Learning" (1992), eq. 6.
    """
    logp, adv, _ = _terms(logp, old_logp, advantage, mask)
    return _unclipped(-adv * logp)


def gmpo(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    segment_ids: Array,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Surrogate:
    """Per-token loss -A exp(mean over the sequence of k), k = logp - old_logp clipped in log space.

    k stops at clip_high where A > 0 and at -clip_low where A < 0; the other side is left free, as
    by the minimum of `ppo_clip`. Every token holds the term of its sequence: reduce with
    `sequence_mean`. Of log-probs at the level of tokens only. Arguments, result and errors as in
    `ppo_clip`; is_low and is_high are of the token's own k.

    Args:
      advantage: one for all tokens of a sequence, as the paper has it. If they differ, each token
        has its own sign and factor.
      segment_ids: [B, T] int32, 0 <= segment_ids <= T; the sequence of each token within its row.
      clip_low, clip_high: nats; width of the range of k below and above 0.
    Raises:
      ValueError: unless clip_low >= 0 and clip_high >= 0.
    Source: arXiv:2507.20673 (GMPO). We differ in one point: the geometric mean stops at exp(20).
    """
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low={clip_low}, clip_high={clip_high}: expected both >= 0")
    (adv,) = masked.clean(mask, jax.lax.stop_gradient(advantage), rank=2)
    log_ratio = token_log_ratio(logp, old_logp, mask)
    is_low = (log_ratio < -clip_low) & (adv < 0)
    is_high = (log_ratio > clip_high) & (adv > 0)
    kept = jnp.where(is_low, -clip_low, jnp.where(is_high, clip_high, log_ratio))
    return Surrogate(-capped_exp(segments.mean(kept, mask, segment_ids)) * adv, is_low, is_high)


def _terms(
    logp: Array, old_logp: Array, advantage: Array, mask: Array
) -> tuple[Array, Array, Array]:
    """Cleaned logp, advantage without gradient, and the ratio r, 1 off mask."""
    logp, adv = masked.clean(mask, logp, jax.lax.stop_gradient(advantage), rank=2)
    return logp, adv, capped_exp(token_log_ratio(logp, old_logp, mask))


def _clipped(
    logp: Array,
    old_logp: Array,
    advantage: Array,
    mask: Array,
    low: float,
    high: float,
    high_if_bad: float,
) -> Surrogate:
    """-A r, r stopped at `high` where A > 0, at `low` and `high_if_bad` where A < 0."""
    _, adv, ratio = _terms(logp, old_logp, advantage, mask)
    is_low = (ratio < low) & (adv < 0)
    top = jnp.where(adv > 0, high, high_if_bad)
    is_high = (ratio > top) & (adv != 0)
    # The minimum, case by case: unlike jnp.minimum, this does not halve the gradient at a tie.
    kept = jnp.where(is_low, low, jnp.where(is_high, top, ratio))
    return Surrogate(-kept * adv, is_low, is_high)


def _unclipped(loss: Array) -> Surrogate:
    nowhere = jnp.zeros(loss.shape, bool)
    return Surrogate(loss, nowhere, nowhere)


def _check_widths(clip_low: float, clip_high: float) -> None:
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low={clip_low}, clip_high={clip_high}: expected 0 <= clip_low < 1 and "
            "clip_high >= 0"
        )
