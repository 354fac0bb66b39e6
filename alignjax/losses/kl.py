"""Log-probs under the policy and the reference -> estimates of KL(policy || ref), per token.

Each estimates sum_x p(x) log(p(x) / ref(x)) from one token x that the policy sampled, with
d = log p(x) - log ref(x). Source of all three: J. Schulman, "Approximating KL Divergence" (2020).
"""

import jax.numpy as jnp
from jax import Array

from alignjax.losses.ratio import MAX_LOG, token_log_ratio


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
