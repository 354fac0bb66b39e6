"""Arrays -> losses, advantages, penalties: pure functions, per token, reduced in one place."""

from alignjax.losses.advantage import group_center, group_zscore, overlong_penalty
from alignjax.losses.clip import Surrogate, ppo_clip
from alignjax.losses.kl import k1, k2, k3
from alignjax.losses.lm import cross_entropy
from alignjax.losses.logprob import TokenLogps, next_token_logps
from alignjax.losses.preference import Pairs
from alignjax.losses.reduce import fixed_length, sequence_mean, token_mean

__all__ = [
    "Pairs",
    "Surrogate",
    "TokenLogps",
    "cross_entropy",
    "fixed_length",
    "group_center",
    "group_zscore",
    "k1",
    "k2",
    "k3",
    "next_token_logps",
    "overlong_penalty",
    "ppo_clip",
    "sequence_mean",
    "token_mean",
]
