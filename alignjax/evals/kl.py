"""Completions of one model, read by another -> the KL divergence between the two."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.precision import ComputeDtype
from alignjax.generate import make_sequence_logps
from alignjax.models import load
from alignjax.rewards.rollout import Rollouts


def log_ratios(
    rollouts: Rollouts, reference: str, mesh: Mesh, *, temperature: float, dtype: ComputeDtype
) -> np.ndarray:
    """log p(completion) - log p_ref(completion) of each completion, whole. [N, G] float64, nats.

    Its mean is an unbiased estimate of KL(p, p_ref) per completion, as the completions are drawn
    from p: all of it, at this temperature, without top-k and top-p.

    Args:
      reference: a directory or an id of the Hub, of a model with the same token ids.
    Raises:
      UserError: if its vocabulary or context is too small.
    """
    model, params = load(reference, mesh=mesh, compute_dtype=dtype)
    out = rollouts.completions
    texts = rollouts.token_ids()
    longest, largest = max(map(len, texts)), max(int(ids.max()) for ids in texts)
    context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    if longest > context:
        raise UserError(
            f"{reference}: a prompt and its completion have {longest} tokens, but its context is "
            f"{context}; lower max_tokens"
        )
    if largest >= vocab_size:
        raise UserError(
            f"{reference}: its vocabulary of {vocab_size} has no token {largest}, which was "
            "sampled: it is no reference of this model"
        )
    logps = make_sequence_logps(model, mesh, row_len=longest, temperature=temperature)
    ref = logps(params, texts, out.lengths)
    own = out.logps.sum(axis=1, dtype=np.float64)
    return (own - ref).reshape(len(rollouts.tasks), -1)
