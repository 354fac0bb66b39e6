"""Texts by themselves: what a model makes of each in a row with nothing else in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def rows(*texts, width):
    """Tokens, segments and positions [N, width] int32 of N texts of ids; 0 after their ends."""
    tokens = np.zeros((len(texts), width), np.int32)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    at = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    return tokens, (at < np.array([[len(ids)] for ids in texts])).astype(np.int32), at


# Compiled, and for rows of one width: one by one, the operations for each length of a text take
# more time than all else in a test.
@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, *rows):
    """[N, width, D]."""
    return model.apply(params, *rows)[0]


@functools.partial(jax.jit, static_argnums=0)
def values(model, params, *rows):
    """[N, width] of a ScalarModel."""
    return model.apply(params, *rows)


@functools.partial(jax.jit, static_argnums=0)
def logps(model, params, temperature, *rows):
    """[N, width, V]: log-probs of what follows each token."""
    return jax.nn.log_softmax(model.logits(params, hidden(model, params, *rows)) / temperature)


@functools.partial(jax.jit, static_argnums=0)
def next_logps(model, params, temperature, *rows):
    """[N, width - 1]: log-probs of the tokens after the first of each row."""
    every = logps(model, params, temperature, *rows)[:, :-1]
    return jnp.take_along_axis(every, rows[0][:, 1:, None], 2)[..., 0]
