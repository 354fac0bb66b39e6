"""Log-probs of the tokens that are there -> the loss of a language model, per token."""

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


def cross_entropy(logp: Array, mask: Array) -> Array:
    """Per-token loss -log p(token).

    Args:
      logp: [B, T] float32, nats; log-prob of each token. Carries gradient.
      mask: [B, T] bool; True on targets. Elsewhere logp may be anything, even inf or nan.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: the negative log-likelihood; arXiv:2203.02155 sec. 3.5 (SFT).
    """
    (logp,) = masked.clean(mask, logp, rank=2)
    return -logp


def dft(logp: Array, mask: Array) -> Array:
    """Per-token loss -sg(p) log p, p the token's probability: unlikely tokens pull less.

    Arguments, result and errors as in `cross_entropy`. The gradient by log p is -p, not -1.

    Source: arXiv:2508.05629 eq. 9 (Dynamic Fine-Tuning).
    """
    (logp,) = masked.clean(mask, logp, rank=2)
    return -jax.lax.stop_gradient(jnp.exp(logp)) * logp


def z_loss(log_normalizer: Array, mask: Array) -> Array:
    """Per-token loss log(Z)^2: keeps the logits from drifting. Its coefficient is the caller's.

    Args:
      log_normalizer: [B, T] float32, nats; log Z, the logsumexp of the logits that predict each
        token (`TokenLogps.log_normalizers`). Carries gradient.
      mask: [B, T] bool; True on targets. Elsewhere log_normalizer may be anything, even inf or nan.
    Returns:
      [B, T] float32, nats^2, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2204.02311 sec. 5 (PaLM), with a coefficient of 1e-4.
    """
    (log_normalizer,) = masked.clean(mask, log_normalizer, rank=2)
    return log_normalizer**2


def label_smoothed(
    logp: Array, mean_logp: Array, mask: Array, *, label_smoothing: float = 0.1
) -> Array:
    """Per-token loss -(1 - e) log p(token) - e mean_v log p(v), e = label_smoothing.

    The cross-entropy of a label that gives each of V entries e / V and the token 1 - e on top.

    Args:
      logp: [B, T] float32, nats; log-prob of each token. Carries gradient.
      mean_logp: [B, T] float32, nats; the mean of log p over the vocabulary where the token was
        predicted (`TokenLogps.mean_logps`). Carries gradient.
      mask: [B, T] bool; True on targets. Elsewhere inputs may be anything, even inf or nan.
      label_smoothing: dimensionless, share of the label that is spread over the vocabulary.
    Returns:
      [B, T] float32, nats, exactly 0 off mask.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 0 <= label_smoothing <= 1.
    Source: arXiv:1512.00567 sec. 7, with the uniform distribution as u.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing}: expected 0 to 1")
    logp, mean_logp = masked.clean(mask, logp, mean_logp, rank=2)
    return -(1.0 - label_smoothing) * logp - label_smoothing * mean_logp
