"""Hidden states -> one number for each token: reward models and critics on any decoder.

With a shared trunk a head stands beside a policy: one pass of the decoder gives the hidden states
that both read (`ScalarModel.apply_both`). With a trunk of its own it is a model of its own
(`ScalarModel.apply`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from alignjax.losses import segments
from alignjax.models.transformer import Model
from alignjax.sharding.place import copied

if TYPE_CHECKING:
    from alignjax.core.types import Params


def reward_head(key: Array, hidden_size: int) -> dict[str, Array]:
    """{"kernel": [D] float32}, each entry of it N(0, 1 / (D + 1)): scores of about unit variance.

    Source: arXiv:2009.01325 app. B.
    """
    scale = (hidden_size + 1) ** -0.5
    return {"kernel": scale * jax.random.normal(key, (hidden_size,), jnp.float32)}


def value_head(key: Array, hidden_size: int) -> dict[str, Array]:
    """{"kernel": [D] float32}, zeros: the first values are 0 for every state."""
    del key
    return {"kernel": jnp.zeros((hidden_size,), jnp.float32)}


def read_scalar(head: Params, hidden: Array) -> Array:
    """hidden [..., D] of any float dtype -> [...] float32: the product with the head's kernel.

    In float32 throughout: a score is compared with others that are near to it. There is no bias: a
    reward is known only up to a constant.
    """
    return jnp.einsum(
        "...d,d->...",
        hidden.astype(jnp.float32),
        head["kernel"].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def last_values(values: Array, segment_ids: Array, num_segments: int) -> tuple[Array, Array]:
    """The value at the last token of each sequence: its score, found by length, never by token id.

    Args:
      values: [B, T] float32. Carries gradient. May be anything on padding, even nan.
      segment_ids: [B, T] int32; 0 on padding, on whichever side; 1 to `num_segments` elsewhere.
      num_segments: S, static; 1 where each row holds one sequence.
    Returns:
      scores [B, S] float32, entry s of segment s + 1, 0 where there is none; is_there [B, S] bool.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    """
    mask = segment_ids > 0
    is_last = segments.is_last(mask, segment_ids)
    scores, counts = (
        segments.each(x, is_last, segment_ids, num_segments=num_segments)
        for x in (values, is_last.astype(jnp.float32))
    )
    return scores, counts > 0


@dataclass(frozen=True)
class ScalarModel:
    """A decoder and a head: hashable, without arrays, a bundle of pure functions of `params`.

    `params` is {"decoder": as of the decoder, "head": {"kernel": [D]}}.

    Attributes:
      decoder: the trunk; its unembedding is not used here.
      new_head: key, D -> the head of a new model: `reward_head` or `value_head`.
    """

    decoder: Model
    new_head: Callable[[Array, int], dict[str, Array]] = reward_head

    def init(self, key: Array) -> dict[str, Any]:
        """Key -> params, all of them new."""
        decoder_key, head_key = jax.random.split(key)
        return self.on(self.decoder.init(decoder_key), head_key)

    def on(self, decoder_params: Params, key: Array) -> dict[str, Any]:
        """A new head on a trunk that is there. The trunk's arrays are not copied."""
        head = self.new_head(key, self.decoder.config.hidden_size)
        return {"decoder": decoder_params, "head": head}

    def apply(
        self,
        params: Params,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        branches: Array | None = None,
    ) -> Array:
        """The value at each token, [B, T] float32, finite everywhere, of no meaning on padding.

        Arguments as in `Model.apply`. A token's value is of the text up to it, itself included: for
        a reward model the score of that text; for a critic the value of the state in which the next
        token is chosen.
        """
        return self.apply_both(params, tokens, segment_ids, positions, branches)[1]

    def apply_both(
        self,
        params: Params,
        tokens: Array,
        segment_ids: Array,
        positions: Array,
        branches: Array | None = None,
    ) -> tuple[Array, Array]:
        """Hidden states [B, T, D], as of `Model.apply`, and values [B, T], from one pass."""
        hidden, _ = self.decoder.apply(
            params["decoder"], tokens, segment_ids, positions, branches=branches
        )
        return hidden, read_scalar(params["head"], hidden)

    def logical_axes(self) -> dict[str, Any]:
        """Like params, with a tuple of axis names for each array; see `sharding.rules`."""
        return {"decoder": self.decoder.logical_axes(), "head": {"kernel": ("embed",)}}


def critic_from(reward_params: Params) -> dict[str, Any]:
    """The params of a critic that starts as the reward model: other buffers, in its shardings.

    Trunk and head both: before any training, the value of a whole text is its reward.
    """
    return copied(reward_params)
