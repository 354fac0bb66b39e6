"""Log-probs under the policy and the reference -> estimates of KL(policy || ref), per token.

Each estimates sum_x p(x) log(p(x) / ref(x)) from one token x that the policy sampled, with
d = log p(x) - log ref(x). Source of k1 to k3: J. Schulman, "Approximating KL Divergence" (2020).
"""

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.losses.ratio import MAX_LOG, capped_exp, token_log_ratio


def k1(logp: Array, ref_logp: Array, mask: Array) -> Array:
    """Per-token estimate d. Unbiased, of either sign; as an on-policy loss its mean gradient is 0.

    Args:
      logp: [B, T] float32, nats; log-prob of the sampled token under the policy. Carries gradient.
      ref_logp: [B, T] float32, nats; the same under the reference. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    """
    return token_log_ratio(logp, ref_logp, mask)


def k2(logp: Array, ref_logp: Array, mask: Array) -> Array:
    """Per-token estimate d^2 / 2. Biased; its on-policy gradient is that of the exact KL.

    Arguments, result and errors as in `k1`.
    """
    return 0.5 * token_log_ratio(logp, ref_logp, mask) ** 2


def k3(logp: Array, ref_logp: Array, mask: Array) -> Array:
    """Per-token estimate exp(-d) - 1 + d. Unbiased and >= 0; its on-policy gradient is biased.

    Arguments, result and errors as in `k1`. Below d = -20 the value stays at exp(20) - 1 - 20 and
    the gradient is 0, so that no float overflows. Near d = 0 two terms cancel: the error is a few
    thousandths of d^2 / 2 at |d| = 1e-4, a fifth at 1e-6, and below 1e-7 the value is 0.
    GRPO's penalty: arXiv:2402.03300 eq. 4.
    """
    d = token_log_ratio(logp, ref_logp, mask)
    d = jnp.where(d < -MAX_LOG, -MAX_LOG, d)  # in both terms: + d alone would push the wrong way
    return jnp.expm1(-d) + d


def weighted_k3(logp: Array, old_logp: Array, ref_logp: Array, mask: Array) -> Array:
    """Per-token estimate r k3, r = exp(logp - old_logp). Unbiased, and so is its gradient, r d.

    Both hold for tokens that old_logp sampled, on policy and off. The ratio is not clipped.

    Args:
      logp: [B, T] float32, nats; log-prob of the sampled token under the policy. Carries gradient.
      old_logp: [B, T] float32, nats; the same under the policy that sampled it. Gradient stopped.
      ref_logp: [B, T] float32, nats; the same under the reference. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
    Returns:
      [B, T] float32, nats, exactly 0 off mask. Differentiable once.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2512.02556 sec. 3.1 (DeepSeek-V3.2, unbiased KL estimate). We differ where a float
    would overflow: r stops at exp(20), and k3 as it says; the gradient stays r d.
    """
    ratio = capped_exp(token_log_ratio(logp, old_logp, mask))
    value = jax.lax.stop_gradient(ratio * k3(logp, ref_logp, mask))
    # d/dlogp of r k3 is r k3 + r (1 - exp(-d)) = r d. Of the two terms on the left the first pushes
    # the wrong way where k3 is stopped, and near d = 0 they cancel: so the right side is given.
    slope = jax.lax.stop_gradient(ratio * token_log_ratio(logp, ref_logp, mask))
    return value + slope * token_log_ratio(logp, logp, mask)
