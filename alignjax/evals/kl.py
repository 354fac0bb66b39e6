"""Completions of one model, read by another -> the KL divergence between the two."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.precision import ComputeDtype
from alignjax.core.types import Params
from alignjax.losses import next_token_logps
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model, load
from alignjax.rewards.rollout import Rollouts
from alignjax.sharding import batch_shards, put_batch

_ROW_TOKENS = 4096
"""Tokens of the rows that one device reads at once, unless a single row has more."""


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
    texts = [
        np.concatenate([sample.prompt_ids, ids[:length]]).astype(np.int32)  # type: ignore[list-item]
        for sample, ids, length in zip(rollouts.samples, out.tokens, out.lengths, strict=True)
    ]
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
    ref = sequence_logps(
        model, params, texts, out.lengths, mesh, row_len=longest, temperature=temperature
    )
    own = out.logps.sum(axis=1, dtype=np.float64)
    return (own - ref).reshape(len(rollouts.tasks), -1)


def sequence_logps(
    model: Model,
    params: Params,
    texts: list[np.ndarray],
    num_targets: np.ndarray,
    mesh: Mesh,
    *,
    row_len: int,
    temperature: float,
) -> np.ndarray:
    """[N] float64, nats: the log-prob of the last `num_targets` tokens of each text, in a row of
    `row_len` of its own."""
    shards = batch_shards(mesh)
    rows_each = max(1, _ROW_TOKENS // row_len)

    @jax.jit
    def logps(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        hidden, _ = model.apply(params, batch["tokens"], batch["segment_ids"], batch["positions"])
        return next_token_logps(
            hidden, model.unembedding(params), batch["tokens"], batch["mask"],
            temperature=temperature, soft_cap=model.config.logit_soft_cap,
            chunk_size=default_chunk_size(rows_each),
        ).logps  # fmt: skip

    found = []
    num_rows, slots = shards * rows_each, np.arange(row_len, dtype=np.int32)
    for start in range(0, len(texts), num_rows):
        part = texts[start : start + num_rows]
        lengths = np.zeros(num_rows, np.int32)
        lengths[: len(part)] = [len(ids) for ids in part]
        targets = np.zeros(num_rows, np.int32)
        targets[: len(part)] = num_targets[start : start + num_rows]
        tokens = np.zeros((num_rows, row_len), np.int32)
        for row, ids in zip(tokens, part, strict=False):
            row[: len(ids)] = ids
        is_real = slots < lengths[:, None]
        batch = {
            "tokens": tokens,
            "segment_ids": is_real.astype(np.int32),
            "positions": np.broadcast_to(slots, tokens.shape) * is_real,
            "mask": is_real & (slots >= (lengths - targets)[:, None]),
        }
        found.append(np.asarray(logps(params, put_batch(batch, mesh)), np.float64).sum(1))
    return np.concatenate(found)[: len(texts)]
