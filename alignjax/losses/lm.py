"""Log-probs of the tokens that are there -> the loss of a language model, per token."""

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
