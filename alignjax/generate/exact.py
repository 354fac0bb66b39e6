"""Prompts -> completions by the computation of a training step: one whole pass for each token.

No cache, no sharing and no other shapes than those of the trainer, so that the log-probs recorded
here are its own to the last bit: what differs in a run of RL is then neither the sampler nor
rounding. It takes as many passes as a completion has tokens: for tests, and to look for faults.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax.core.types import LENGTH, STOP, Completions, GenerateFn, Params, Sampling
from alignjax.losses import next_token_logps
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model
from alignjax.sharding import batch_shards, fetch, put_batch


def make_exact_generate(model: Model, mesh: Mesh, *, num_rows: int, row_len: int) -> GenerateFn:
    """Makes a `GenerateFn` of temperature and stop tokens, compiled once for each temperature.

    Keys are those of `generate.Engine`: row i * G + g decides the numbers of sample g of prompt i.

    Args:
      num_rows, row_len: of a micro-batch of training, in which each completion has its own row.
    """
    chunk_size = default_chunk_size(num_rows // batch_shards(mesh))
    slots = np.arange(row_len, dtype=np.int32)

    # As in training, the temperature is a constant: dividing by a variable rounds otherwise.
    @functools.partial(jax.jit, static_argnames="temperature")
    def advance(
        params: Params,
        tokens: Array,
        lengths: Array,
        keys: Array,
        step: Array,
        *,
        temperature: float,
    ) -> tuple[Array, Array, Array, Array]:
        """Rows [R, T] of `lengths` real tokens -> the same with one more; of each row that token,
        its log-prob, and the entropy of what it was drawn from.

        Nobody reads the entropy. Training computes it beside the log-prob, and so does this: the
        compiler fuses both into one loop, which rounds otherwise than that of the log-prob alone.
        """
        is_real = slots < lengths[:, None]
        positions = jnp.where(is_real, slots, 0)
        hidden, _ = model.apply(params, tokens, is_real.astype(jnp.int32), positions)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        tau = temperature or 1.0
        logits = model.logits(params, last)
        cdf = jnp.cumsum(jax.nn.softmax(logits / tau, axis=-1), axis=-1)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(keys)
        drawn = jnp.argmax(cdf > (uniform * cdf[:, -1])[:, None], axis=-1)
        token = (drawn if temperature else jnp.argmax(logits, axis=-1)).astype(jnp.int32)
        is_new = slots == lengths[:, None]
        tokens = jnp.where(is_new, token[:, None], tokens)
        found = next_token_logps(
            hidden, model.unembedding(params), tokens, is_new,
            temperature=tau, soft_cap=model.config.logit_soft_cap, chunk_size=chunk_size,
            with_entropy=True,
        )  # fmt: skip
        assert found.entropies is not None
        return tokens, token, jnp.sum(found.logps, axis=1), jnp.sum(found.entropies, axis=1)

    def turn(
        params: Params, tokens: np.ndarray, lengths: np.ndarray, keys: Array, sampling: Sampling
    ) -> list[np.ndarray]:
        """Of R rows: tokens [R, C], logps [R, C], counts [R], is_stopped [R]."""
        shape = len(tokens), sampling.max_tokens
        out, logps = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        counts, is_done = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
        rows: Array = put_batch({"tokens": tokens}, mesh, 0)["tokens"]
        for step in range(sampling.max_tokens):
            at = put_batch({"lengths": lengths + counts}, mesh, 0)["lengths"]
            rows, token, logp, _ = advance(
                params, rows, at, keys, jnp.int32(step), temperature=sampling.temperature
            )
            token, logp = fetch((token, logp))
            out[:, step] = np.where(is_done, 0, token)
            logps[:, step] = np.where(is_done, 0.0, logp)
            counts += ~is_done
            is_done |= np.isin(token, sampling.stop_tokens)
            if is_done.all():
                break
        return [out, logps, counts, is_done]

    def generate(
        params: Params, prompts: np.ndarray, lengths: np.ndarray, key: Array, sampling: Sampling
    ) -> Completions:
        _check(prompts, sampling, row_len)
        group = sampling.num_samples
        total = len(prompts) * group
        padded = -(-total // num_rows) * num_rows
        tokens = np.zeros((padded, row_len), np.int32)
        tokens[:total, : prompts.shape[1]] = np.repeat(prompts, group, axis=0)
        starts = np.ones(padded, np.int32)
        starts[:total] = np.repeat(lengths, group)
        tokens[slots >= starts[:, None]] = 0
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(np.arange(padded))
        turns = [
            turn(params, tokens[part], starts[part], keys[part], sampling)
            for part in (slice(i, i + num_rows) for i in range(0, padded, num_rows))
        ]
        out, logps, counts, is_stopped = (
            np.concatenate(parts)[:total] for parts in zip(*turns, strict=True)
        )
        reasons = np.where(is_stopped, STOP, LENGTH).astype(np.int8)
        return Completions(out, counts, logps, reasons)

    return generate


def _check(prompts: np.ndarray, sampling: Sampling, row_len: int) -> None:
    plain = Sampling(
        temperature=sampling.temperature, max_tokens=sampling.max_tokens,
        stop_tokens=sampling.stop_tokens, num_samples=sampling.num_samples,
    )  # fmt: skip
    if sampling != plain:
        raise ValueError(
            f"{sampling}: deterministic sampling knows temperature and stop tokens alone; leave "
            "the other settings at their defaults, or set deterministic: false"
        )
    if prompts.shape[1] + sampling.max_tokens > row_len:
        raise ValueError(
            f"prompts of {prompts.shape[1]} tokens and max_tokens={sampling.max_tokens} exceed "
            f"rows of {row_len}"
        )
