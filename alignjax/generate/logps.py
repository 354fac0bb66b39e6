"""Texts of token ids -> the log-probs that a model gives to how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.core.types import Params
from alignjax.losses import next_token_logps
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model
from alignjax.sharding import batch_shards, fetch, put_batch

_ROW_TOKENS = 4096
"""Tokens of the rows that one device reads at once, unless a single row has more."""

SequenceLogps = Callable[[Params, Sequence[np.ndarray], np.ndarray], np.ndarray]
"""Params, N texts ([length] int32 each) and num_targets [N] -> [N] float64, nats: the log-prob of
the last `num_targets` tokens of each text, given those before."""


def make_sequence_logps(
    model: Model, mesh: Mesh, *, row_len: int, temperature: float
) -> SequenceLogps:
    """Makes the function; it is compiled once, whatever texts it is given.

    Args:
      row_len: tokens of the longest text. Each stands in a row of its own.
      temperature: logits are divided by it, as in sampling.
    """
    shards = batch_shards(mesh)
    rows_each = max(1, _ROW_TOKENS // row_len)
    num_rows, slots = shards * rows_each, np.arange(row_len, dtype=np.int32)

    @jax.jit
    def logps(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
        hidden, _ = model.apply(params, batch["tokens"], batch["segment_ids"], batch["positions"])
        return next_token_logps(
            hidden, model.unembedding(params), batch["tokens"], batch["mask"],
            temperature=temperature, soft_cap=model.config.logit_soft_cap,
            chunk_size=default_chunk_size(rows_each),
        ).logps  # fmt: skip

    def rows(texts: Sequence[np.ndarray], num_targets: np.ndarray) -> dict[str, np.ndarray]:
        lengths, targets = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
        lengths[: len(texts)] = [len(ids) for ids in texts]
        targets[: len(texts)] = num_targets
        tokens = np.zeros((num_rows, row_len), np.int32)
        for row, ids in zip(tokens, texts, strict=False):
            row[: len(ids)] = ids
        is_real = slots < lengths[:, None]
        return {
            "tokens": tokens,
            "segment_ids": is_real.astype(np.int32),
            "positions": np.broadcast_to(slots, tokens.shape) * is_real,
            "mask": is_real & (slots >= (lengths - targets)[:, None]),
        }

    def sequence_logps(
        params: Params, texts: Sequence[np.ndarray], num_targets: np.ndarray
    ) -> np.ndarray:
        found = []
        for start in range(0, len(texts), num_rows):
            part = slice(start, start + num_rows)
            batch = put_batch(rows(texts[part], num_targets[part]), mesh)
            found.append(fetch(logps(params, batch)).astype(np.float64).sum(1))
        return np.concatenate(found)[: len(texts)]

    return sequence_logps
