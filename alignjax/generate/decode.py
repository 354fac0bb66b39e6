"""Prompts -> completions, as one compiled function: prefill, then a loop of single steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core.types import Params
from alignjax.generate.sample import sample_token
from alignjax.models import Model
from alignjax.models.attention import Cache


class Limits(NamedTuple):
    """What may change from call to call without a new compilation: scalars, and stop tokens."""

    temperature: Array
    top_k: Array
    top_p: Array
    max_tokens: Array
    stop_tokens: Array
    """[S] int32; filled up with -1, which no token equals."""


class Decoding(NamedTuple):
    """The state of the loop over tokens. N = B * G rows."""

    step: Array
    tokens: Array
    logps: Array
    lengths: Array
    is_done: Array
    cache: Cache


def left_pad(tokens: Array, lengths: Array) -> tuple[Array, Array, Array]:
    """Right-padded prompts -> tokens, segment ids and positions [B, P], padded on the left.

    Left padding lets all rows write their next token into the same slot of the cache.
    """
    width = tokens.shape[1]
    source = jnp.arange(width)[None, :] - (width - lengths)[:, None]
    positions = jnp.maximum(source, 0)
    is_real = source >= 0
    shifted = jnp.where(is_real, jnp.take_along_axis(tokens, positions, axis=1), 0)
    return shifted, is_real.astype(jnp.int32), positions


def decode(
    params: Params,
    prompts: Array,
    lengths: Array,
    row_keys: Array,
    limits: Limits,
    *,
    model: Model,
    num_samples: int,
    capacity: int,
) -> tuple[Array, Array, Array, Array]:
    """Samples up to `capacity` tokens after each prompt; stops when every row has stopped.

    Args:
      params: the model's weights.
      prompts: [B, P] int32, right-padded.
      lengths: [B] int32; 0 marks a row that only fills the batch up and is never waited for.
      row_keys: [B * G, 2] uint32; one PRNG key per row, so that a row's samples do not depend on
        which other rows share its batch.
      limits: traced sampling parameters.
      model, num_samples (G), capacity (C): static.
    Returns:
      tokens [N, C] int32 and logps [N, C] float32, both 0 off length; lengths [N] int32;
      is_stopped [N] bool, True where a stop token ended the row.
    """
    num_rows = prompts.shape[0] * num_samples
    tokens, segment_ids, positions = left_pad(prompts, lengths)
    cache = model.init_cache(prompts.shape[0], prompts.shape[1] + capacity)
    hidden, cache = model.apply(params, tokens, segment_ids, positions, cache)
    cache = cache._replace(
        k=jnp.repeat(cache.k, num_samples, axis=1),
        v=jnp.repeat(cache.v, num_samples, axis=1),
        segment_ids=jnp.repeat(cache.segment_ids, num_samples, axis=0),
    )
    lengths = jnp.repeat(lengths, num_samples)

    def draw(last: Array, state: Decoding) -> Decoding:
        logits = model.logits(params, last)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.step)))(
            row_keys
        )
        token, logp = sample_token(logits, uniform, limits.temperature, limits.top_k, limits.top_p)
        is_stop = jnp.any(token[:, None] == limits.stop_tokens[None, :], axis=-1)
        return state._replace(
            step=state.step + 1,
            tokens=state.tokens.at[:, state.step].set(jnp.where(state.is_done, 0, token)),
            logps=state.logps.at[:, state.step].set(jnp.where(state.is_done, 0.0, logp)),
            lengths=state.lengths + ~state.is_done,
            is_done=state.is_done | is_stop,
        )

    def advance(state: Decoding) -> Decoding:
        token = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        position = (lengths + state.step - 1)[:, None]
        hidden, cache = model.apply(params, token, jnp.ones_like(token), position, state.cache)
        return draw(hidden[:, -1], state._replace(cache=cache))

    state = Decoding(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((num_rows, capacity), jnp.int32),
        logps=jnp.zeros((num_rows, capacity), jnp.float32),
        lengths=jnp.zeros(num_rows, jnp.int32),
        is_done=lengths == 0,
        cache=cache,
    )
    state = draw(jnp.repeat(hidden[:, -1], num_samples, axis=0), state)
    state = jax.lax.while_loop(
        lambda state: (state.step < limits.max_tokens) & ~jnp.all(state.is_done), advance, state
    )
    return state.tokens, state.logps, state.lengths, state.is_done
