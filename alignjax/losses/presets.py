"""Five short lists of functions, and presets that choose from them: one line for each paper.

An RL algorithm is a product: an advantage, the level at which ratios are taken, a surrogate, an
estimator of the KL and where it counts, and a reduction. What differs between two papers differs in
a function of one list; no step asks for the name of an algorithm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jax import Array

from alignjax.core.types import Weighted
from alignjax.losses import advantage, clip, kl, ratio, reduce
from alignjax.losses.clip import Surrogate
from alignjax.losses.trajectory import gae, reinforce_pp


class Outcomes(NamedTuple):
    """What is known of the completions of N prompts, G of each, when they are complete."""

    rewards: Array
    """[N, G] float32, reward units."""
    is_valid: Array
    """[N, G] bool; False where there is no reward."""
    lengths: Array
    """[N, G] int32, tokens; stop token included."""
    part_rewards: Array | None = None
    """[N, G, R] float32; the rewards one by one, for `gdpo`."""
    greedy_rewards: Array | None = None
    """[N] float32; reward of the most likely answer, for `remax`."""


def _given(outcomes: Outcomes, name: str) -> Array:
    if (array := getattr(outcomes, name)) is None:
        raise ValueError(f"Outcomes.{name}=None: this advantage needs it")
    return array


ADVANTAGES: Mapping[str, Callable[[Outcomes], Array]] = {
    "group_zscore": lambda o: advantage.group_zscore(o.rewards, o.is_valid),
    "group_center": lambda o: advantage.group_center(o.rewards, o.is_valid),
    "leave_one_out": lambda o: advantage.leave_one_out(o.rewards, o.is_valid),
    "reinforce_pp_baseline": lambda o: advantage.reinforce_pp_baseline(o.rewards, o.is_valid),
    "remax": lambda o: advantage.remax(o.rewards, _given(o, "greedy_rewards"), o.is_valid),
    "opo": lambda o: advantage.opo(o.rewards, o.lengths, o.is_valid),
    "gpg": lambda o: advantage.gpg(o.rewards, o.is_valid),
    "gdpo": lambda o: advantage.gdpo(_given(o, "part_rewards"), o.is_valid),
}
"""Outcomes -> [N, G] advantages, each of all tokens of a completion."""

TOKEN_ADVANTAGES: Mapping[str, Callable[..., Array]] = {
    "gae": lambda *a, **options: gae(*a, **options).advantages,
    "reinforce_pp": reinforce_pp,
}
"""Rewards of tokens -> [B, T] advantages; see the functions for their arguments."""

LEVELS: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "token_level": ratio.token_level,
    "sequence_level": ratio.sequence_level,
    "sequence_mean_level": ratio.sequence_mean_level,
    "sequence_token_level": ratio.sequence_token_level,
}
"""Log-probs, mask, segment_ids -> the log-probs that ratios are made of."""

SURROGATES: Mapping[str, Callable[..., Surrogate]] = {
    "ppo_clip": lambda *a, **options: clip.ppo_clip(*a[:4], **options),
    "dual_clip": lambda *a, **options: clip.dual_clip(*a[:4], **options),
    "cispo": lambda *a, **options: clip.cispo(*a[:4], **options),
    "sapo": lambda *a, **options: clip.sapo(*a[:4], **options),
    "reinforce": lambda *a, **options: clip.reinforce(*a[:4], **options),
    "gmpo": clip.gmpo,
}
"""Log-probs, old log-probs, advantages, mask, segment_ids, and options -> per-token losses."""

KL_ESTIMATORS: Mapping[str, Callable[[Array, Array, Array, Array], Array]] = {
    "k1": lambda logp, old, ref, mask: kl.k1(logp, ref, mask),
    "k2": lambda logp, old, ref, mask: kl.k2(logp, ref, mask),
    "k3": lambda logp, old, ref, mask: kl.k3(logp, ref, mask),
    "weighted_k3": kl.weighted_k3,
}
"""Log-probs, old and reference log-probs, mask -> per-token estimates."""

REDUCTIONS: Mapping[str, Callable[[Array, Array, Array, int], Weighted]] = {
    "token_mean": lambda x, mask, ids, n: reduce.token_mean(x, mask),
    "sequence_mean": lambda x, mask, ids, n: reduce.sequence_mean(x, mask, ids),
    "sequence_sum": lambda x, mask, ids, n: reduce.sequence_sum(x, mask, ids),
    "fixed_length": lambda x, mask, ids, n: reduce.fixed_length(x, mask, ids, max_len=n),
    "micro_batch_mean": lambda x, mask, ids, n: reduce.micro_batch_mean(x, mask),
}
"""Per-token losses, mask, segment_ids, limit on the tokens of a completion -> sum and weight."""


@dataclass(frozen=True)
class Algorithm:
    """One choice from each list, by name.

    Attributes:
      advantage: of ADVANTAGES or TOKEN_ADVANTAGES.
      surrogate: of SURROGATES.
      reduction: of REDUCTIONS.
      level: of LEVELS.
      kl: of KL_ESTIMATORS.
      kl_coef: weight of the KL to the reference; 0 needs no reference.
      kl_in_reward: whether the KL is taken off the rewards, with k1 and no gradient of its own,
        instead of being added to the loss.
      importance_cap: weighs the terms of each token by how much more likely it is under the policy
        of `old_logp` than under what has sampled it, at most so much (`ratio.truncated_weight`);
        None: no weights.
      options: hyperparameters of the surrogate that differ from its defaults.
    """

    advantage: str
    surrogate: str
    reduction: str
    level: str = "token_level"
    kl: str = "k3"
    kl_coef: float = 0.0
    kl_in_reward: bool = False
    importance_cap: float | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lists = {
            "advantage": {**ADVANTAGES, **TOKEN_ADVANTAGES}, "surrogate": SURROGATES,
            "reduction": REDUCTIONS, "level": LEVELS, "kl": KL_ESTIMATORS,
        }  # fmt: skip
        for name, known in lists.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}"
                )


PRESETS: Mapping[str, Algorithm] = {
    "ppo": Algorithm("gae", "ppo_clip", "token_mean", kl="k1", kl_coef=0.05, kl_in_reward=True),
    "grpo": Algorithm("group_zscore", "ppo_clip", "sequence_mean", kl_coef=0.04),
    "dr_grpo": Algorithm("group_center", "ppo_clip", "fixed_length"),
    "bnpo": Algorithm("group_zscore", "ppo_clip", "micro_batch_mean"),
    "dapo": Algorithm("group_zscore", "ppo_clip", "token_mean", options={"clip_high": 0.28}),
    "gspo": Algorithm("group_zscore", "ppo_clip", "sequence_mean", "sequence_mean_level",
                      options={"clip_low": 3e-4, "clip_high": 4e-4}),
    "gmpo": Algorithm("group_zscore", "gmpo", "sequence_mean"),
    "cispo": Algorithm("group_zscore", "cispo", "token_mean"),
    "sapo": Algorithm("group_zscore", "sapo", "sequence_mean"),
    "rloo": Algorithm("leave_one_out", "ppo_clip", "sequence_mean", "sequence_level",
                      kl="k1", kl_coef=0.05, kl_in_reward=True),
    "reinforce_pp": Algorithm("reinforce_pp", "ppo_clip", "token_mean",
                              kl="k1", kl_coef=0.001, kl_in_reward=True),
    "reinforce_pp_baseline": Algorithm("reinforce_pp_baseline", "ppo_clip", "token_mean",
                                       kl="k2", kl_coef=0.001),
    "remax": Algorithm("remax", "reinforce", "sequence_sum", kl="k1", kl_coef=0.05,
                       kl_in_reward=True),
    "opo": Algorithm("opo", "reinforce", "sequence_sum"),
    "gdpo": Algorithm("gdpo", "ppo_clip", "sequence_mean"),
    "gpg": Algorithm("gpg", "reinforce", "token_mean"),
}  # fmt: skip
"""See docs/papers.md for the papers, and for what each leaves open."""


class PolicyLoss(NamedTuple):
    """The loss of one micro-batch and what metrics want of it."""

    loss: Weighted
    """Carries gradient."""
    surrogate: Surrogate
    kl: Array | None
    """[B, T] float32, nats; None where there is no KL in the loss."""
    weights: Array | None
    """[B, T] float32, dimensionless; of importance, None where there are none. No gradient."""


def policy_loss(
    algorithm: Algorithm,
    logp: Array,
    old_logp: Array,
    ref_logp: Array | None,
    advantages: Array,
    mask: Array,
    segment_ids: Array,
    *,
    max_len: int,
    rollout_logp: Array | None = None,
) -> PolicyLoss:
    """The loss that an algorithm chooses: reduce(weight * (surrogate + kl_coef * kl)).

    Args:
      logp: [B, T] float32, nats; log-prob of each token under the policy. Carries gradient.
      old_logp: [B, T] float32, nats; under the policy that sampled. Gradient stopped.
      ref_logp: [B, T] float32, nats; under the reference. None if `kl_coef` is 0 or the KL counts
        in the reward.
      advantages: [B, T] float32. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything.
      segment_ids: [B, T] int32; the sequence of each token within its row.
      max_len: tokens; limit on the length of a completion, read by `fixed_length`.
      rollout_logp: [B, T] float32, nats; as recorded while sampling. None if there is no
        `importance_cap`. Gradient stopped.
    """
    level = LEVELS[algorithm.level]
    old = level(old_logp, mask, segment_ids)
    surrogate = SURROGATES[algorithm.surrogate](
        level(logp, mask, segment_ids),
        old,
        advantages,
        mask,
        segment_ids,
        **algorithm.options,
    )
    loss, penalty = surrogate.loss, None
    if algorithm.kl_coef and not algorithm.kl_in_reward:
        if ref_logp is None:
            raise ValueError(f"ref_logp=None with kl_coef={algorithm.kl_coef}: expected log-probs")
        penalty = KL_ESTIMATORS[algorithm.kl](logp, old_logp, ref_logp, mask)
        loss = loss + algorithm.kl_coef * penalty
    weights = None
    if algorithm.importance_cap is not None:
        if rollout_logp is None:
            raise ValueError(
                f"rollout_logp=None with importance_cap={algorithm.importance_cap}: expected "
                "log-probs"
            )
        rollout = level(rollout_logp, mask, segment_ids)
        weights = ratio.truncated_weight(old, rollout, mask, cap=algorithm.importance_cap)
        loss = weights * loss
    reduction = REDUCTIONS[algorithm.reduction]
    return PolicyLoss(reduction(loss, mask, segment_ids, max_len), surrogate, penalty, weights)
