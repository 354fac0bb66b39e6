"""Arrays -> losses, advantages, penalties: pure functions, per token, reduced in one place."""

from alignjax.losses.advantage import group_center, group_zscore, overlong_penalty
from alignjax.losses.clip import Surrogate, cispo, dual_clip, gmpo, ppo_clip, reinforce, sapo
from alignjax.losses.entropy import (
    clip_cov_mask,
    entropy_bonus,
    kl_cov_mask,
    token_covariance,
    top_entropy_mask,
)
from alignjax.losses.kl import k1, k2, k3, weighted_k3
from alignjax.losses.lm import cross_entropy
from alignjax.losses.logprob import TokenLogps, next_token_logps
from alignjax.losses.preference import Pairs
from alignjax.losses.ratio import (
    masked_weight,
    off_policy_sequence_mask,
    sequence_level,
    sequence_mean_level,
    sequence_token_level,
    token_level,
    truncated_weight,
)
from alignjax.losses.reduce import (
    example_mean,
    fixed_length,
    micro_batch_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)

__all__ = [
    "Pairs",
    "Surrogate",
    "TokenLogps",
    "cispo",
    "clip_cov_mask",
    "cross_entropy",
    "dual_clip",
    "entropy_bonus",
    "example_mean",
    "fixed_length",
    "gmpo",
    "group_center",
    "group_zscore",
    "k1",
    "k2",
    "k3",
    "kl_cov_mask",
    "masked_weight",
    "micro_batch_mean",
    "next_token_logps",
    "off_policy_sequence_mask",
    "overlong_penalty",
    "ppo_clip",
    "reinforce",
    "sapo",
    "sequence_level",
    "sequence_mean",
    "sequence_mean_level",
    "sequence_sum",
    "sequence_token_level",
    "token_covariance",
    "token_level",
    "token_mean",
    "top_entropy_mask",
    "truncated_weight",
    "weighted_k3",
]
