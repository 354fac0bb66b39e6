"""Rewards of groups of completions -> advantages: how much better than its siblings each is."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.core import masked


def group_zscore(rewards: Array, is_valid: Array, *, ddof: int = 1, eps: float = 1e-4) -> Array:
    """Advantage (R - mean) / (std + eps) within each group of completions of one prompt.

    Args:
      rewards: [N, G] float32, reward units; one row for each prompt. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
      ddof: the squared deviations are divided by (number of valid samples - ddof).
      eps: reward units; keeps groups that almost agree from blowing up.
    Returns:
      [N, G] float32, dimensionless; exactly 0 where not valid, in a group of fewer than 2 valid
      samples (never the raw reward), and in a group whose valid rewards are all equal.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if G is 1, or unless ddof is 0 or 1 and eps > 0.
    Source: arXiv:2402.03300 sec. 4.1.2 (GRPO), which has no eps and leaves ddof open.
    """
    if ddof not in (0, 1) or eps <= 0:
        raise ValueError(f"ddof={ddof}, eps={eps}: expected ddof 0 or 1 and eps > 0")
    rewards = _groups(rewards, is_valid)
    std = masked.std(rewards, is_valid, 1, ddof=ddof, keepdims=True)
    return _centered(rewards, is_valid, 1) / (std + eps)


def group_center(rewards: Array, is_valid: Array) -> Array:
    """Advantage R - mean within each group of completions of one prompt.

    Args:
      rewards: [N, G] float32, reward units; one row for each prompt. Gradient stopped.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
    Returns:
      [N, G] float32, reward units; exactly 0 where `group_zscore` is.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if G is 1.
    Source: arXiv:2503.20783 sec. 3.2 (Dr. GRPO).
    """
    return _centered(_groups(rewards, is_valid), is_valid, 1)


def is_informative(rewards: Array, is_valid: Array) -> Array:
    """[N] bool; whether a group has an advantage at all: 2 valid rewards or more, not all equal.

    Arguments and errors as in `group_center`. Source: arXiv:2503.14476 sec. 3.2 (DAPO), where
    groups that are all right or all wrong are sampled anew.
    """
    return _is_spread(_groups(rewards, is_valid), is_valid, 1)[:, 0]


def leave_one_out(rewards: Array, is_valid: Array) -> Array:
    """Advantage R - mean of the other valid rewards of the group.

    Arguments, result and errors as in `group_center`, which it exceeds by the factor n / (n - 1)
    for n valid samples. Source: arXiv:2402.14740 sec. 2.4 (RLOO).
    """
    centered = group_center(rewards, is_valid)
    count = jnp.sum(is_valid, 1, dtype=jnp.float32, keepdims=True)
    return centered * count / jnp.maximum(count - 1.0, 1.0)


def opo(rewards: Array, lengths: Array, is_valid: Array) -> Array:
    """Advantage R - sum_i L_i R_i / sum_i L_i: longer completions weigh more in the baseline.

    Args:
      rewards: [N, G] float32, reward units; one row for each prompt. Gradient stopped.
      lengths: [N, G] int32, tokens, at least 1 where valid; lengths of the completions.
      is_valid: [N, G] bool; False where there is no reward. There, the rest may be anything.
    Returns:
      [N, G] float32, reward units; exactly 0 where `group_zscore` is.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if G is 1.
    Source: arXiv:2505.23585 (OPO): the baseline of least variance, if the squared norm of a
    completion's gradient grows with its length.
    """
    rewards = _groups(rewards, is_valid)
    chex.assert_equal_shape([rewards, lengths])
    chex.assert_type(lengths, jnp.int32)
    weights = jnp.where(is_valid, lengths, 0).astype(rewards.dtype)
    total = jnp.sum(weights, 1, keepdims=True)
    baseline = jnp.sum(weights * rewards, 1, keepdims=True) / jnp.maximum(total, 1.0)
    return jnp.where(is_valid & _is_spread(rewards, is_valid, 1), rewards - baseline, 0.0)


def remax(rewards: Array, greedy_rewards: Array, is_valid: Array) -> Array:
    """Advantage R - reward of the greedy completion of the same prompt.

    Args:
      rewards: [N, G] float32, reward units; one row for each prompt, G may be 1. Gradient stopped.
      greedy_rewards: [N] float32, reward units; of the completion that takes the most likely token
        at every step. Gradient stopped. Not read in a group without a valid sample.
      is_valid: [N, G] bool; False where there is no reward. There, rewards may be anything.
    Returns:
      [N, G] float32, reward units; exactly 0 where not valid.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: arXiv:2310.10505 sec. 4 (ReMax).
    """
    chex.assert_shape(greedy_rewards, is_valid.shape[:1])
    baseline = jnp.broadcast_to(greedy_rewards[:, None], is_valid.shape)
    rewards, baseline = masked.clean(is_valid, rewards, baseline, rank=2)
    return jax.lax.stop_gradient(rewards - baseline)


def gpg(rewards: Array, is_valid: Array) -> Array:
    """Advantage alpha (R - mean), alpha = samples / samples of groups whose rewards differ.

    Arguments, result and errors as in `group_center`. alpha is over the whole batch given: it makes
    the mean over all samples one over those that have a gradient. 0 if no group has any.

    Source: arXiv:2504.02546 eq. 6 to 8 (GPG) with F_norm = 1; alpha = B / (B - M) there, of B
    samples M in groups that agree. With groups of one size, groups may be counted instead.
    """
    is_used = is_valid & is_informative(rewards, is_valid)[:, None]
    num_used = jnp.sum(is_used, dtype=jnp.float32)
    num_valid = jnp.sum(is_valid, dtype=jnp.float32)
    return group_center(rewards, is_valid) * num_valid / jnp.maximum(num_used, 1.0)


def pass_at_k(is_correct: Array, is_valid: Array, *, k: int) -> Array:
    """Advantage of a completion when k of the group's n are drawn and one right one is enough.

    Every set of k is rewarded 1 if any of it is right; its members share (reward - mean) / std
    over the sets. The mean over the sets that a completion is in has the closed form
    (1 - Rbar) / sigma if right, (1 - Rbar - C(n_wrong - 1, k - 1) / C(n - 1, k - 1)) / sigma if
    wrong, with Rbar = 1 - C(n_wrong, k) / C(n, k) and sigma = sqrt(Rbar (1 - Rbar)).

    Args:
      is_correct: [N, G] bool; one row for each prompt.
      is_valid: [N, G] bool; False where there is no verdict.
      k: number of completions drawn; 1 gives the z-score of the verdicts, with ddof 0 and no eps.
    Returns:
      [N, G] float32, dimensionless; exactly 0 where not valid and where sigma is 0: no valid sample
      is right, fewer than k are wrong, or there are no more than k, of which only one set exists.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless 1 <= k < G.
    Source: arXiv:2508.10751 sec. 2.4 and appendix (Pass@k training, analytical derivation).
    """
    chex.assert_rank([is_correct, is_valid], 2)
    chex.assert_equal_shape([is_correct, is_valid])
    chex.assert_type([is_correct, is_valid], bool)
    if not 1 <= k < is_valid.shape[1]:
        raise ValueError(f"k={k}: expected 1 <= k < group_size={is_valid.shape[1]}")
    dtype = jnp.result_type(float)
    n = jnp.sum(is_valid, 1, dtype=dtype, keepdims=True)
    wrong = jnp.sum(is_valid & ~is_correct, 1, dtype=dtype, keepdims=True)
    # C(wrong - 1, k - 1) / C(n - 1, k - 1), factor by factor: no binomial can overflow.
    i = jnp.arange(1, k)
    factors = jnp.maximum(wrong - i, 0.0) / jnp.maximum(n - i, 1.0)
    others_wrong = jnp.prod(factors, axis=1, keepdims=True)
    wrong_frac = wrong / jnp.maximum(n, 1.0)
    all_wrong = wrong_frac * others_wrong  # 1 - Rbar
    is_spread = (all_wrong > 0.0) & (all_wrong < 1.0)  # with n <= k it is 0 or 1
    sigma = jnp.sqrt(jnp.where(is_spread, all_wrong * (1.0 - all_wrong), 1.0))
    advantage = jnp.where(is_correct, all_wrong, all_wrong - others_wrong) / sigma
    return jnp.where(is_valid & is_spread, advantage, 0.0)


def gdpo(
    part_rewards: Array,
    is_valid: Array,
    *,
    weights: tuple[float, ...] | None = None,
    eps: float = 1e-4,
) -> Array:
    """Advantage A / (std(A) + eps), A = sum_r weights_r group_zscore(R_r): each reward by itself.

    Args:
      part_rewards: [N, G, R] float32, units of each reward. Gradient stopped.
      is_valid: [N, G] bool; False where there are no rewards. There, they may be anything.
      weights: R numbers; what each reward counts. 1 each by default.
      eps: keeps groups, and the batch, that almost agree from blowing up.
    Returns:
      [N, G] float32, dimensionless; exactly 0 where not valid and in a group that agrees on every
      reward. The std of A is over all valid samples of the whole batch given, with ddof 1.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if G is 1, on another number of weights than R, or unless eps > 0.
    Source: arXiv:2601.05242 (GDPO), with the ddof and eps of the authors' code. The batch mean that
    is subtracted there is 0 already, as each group's is.
    """
    chex.assert_rank(part_rewards, 3)
    num_rewards = part_rewards.shape[2]
    weights = (1.0,) * num_rewards if weights is None else weights
    if len(weights) != num_rewards:
        raise ValueError(f"weights={weights}: expected one for each of {num_rewards} rewards")
    parts = [
        weight * group_zscore(part_rewards[:, :, r], is_valid, eps=eps)
        for r, weight in enumerate(weights)
    ]
    advantage = jnp.sum(jnp.stack(parts), axis=0)
    return advantage / (masked.std(advantage, is_valid, ddof=1) + eps)


def global_whiten(
    advantage: Array, mask: Array, *, shift_mean: bool = True, eps: float = 1e-8
) -> Array:
    """Advantage (A - mean) / sqrt(var + eps) over the whole batch given.

    Args:
      advantage: [B, T] or [N, G] float32, reward units; of tokens or of completions. Gradient
        stopped. With shift_mean=False it may be rewards.
      mask: bool of the same shape; True on the entries that count. Elsewhere they may be anything.
      shift_mean: False adds the mean again, so that only the spread is scaled (reward whitening).
      eps: squared reward units; keeps a batch that almost agrees from blowing up.
    Returns:
      float32 of the same shape, dimensionless; exactly 0 off mask. If all are equal, exactly 0, or
      the mean.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: unless eps > 0.
    Source: PPO for language models as in arXiv:1909.08593, whose code divides by the number of
    entries in var, not by that less 1. There each minibatch is whitened by itself; here, whiten the
    global batch before it is split.
    """
    if eps <= 0:
        raise ValueError(f"eps={eps}: expected eps > 0")
    (x,) = masked.clean(mask, jax.lax.stop_gradient(advantage), rank=2)
    centered = _centered(x, mask, None)
    whitened = centered / jnp.sqrt(masked.mean(centered**2, mask) + eps)
    return whitened if shift_mean else jnp.where(mask, whitened + masked.mean(x, mask), 0.0)


def reinforce_pp_baseline(rewards: Array, is_valid: Array) -> Array:
    """Advantage `global_whiten(group_center(R))`: the group's mean, the whole batch's spread.

    Arguments, result and errors as in `group_center`. Completions are whitened, not their tokens:
    each counts once, however long. Source: arXiv:2501.03262 (REINFORCE++ with baseline).
    """
    return global_whiten(group_center(rewards, is_valid), is_valid)


def distillation_advantage(policy_logp: Array, teacher_logp: Array, mask: Array) -> Array:
    """Per-token advantage -(log p(token) - log teacher(token)), of a token that p sampled.

    Args:
      policy_logp: [B, T] float32, nats; log-prob of the token under the student. Gradient stopped:
        a surrogate such as `ppo_clip` is what carries it.
      teacher_logp: [B, T] float32, nats; the same under the teacher. Gradient stopped.
      mask: [B, T] bool; True on completion tokens. Elsewhere inputs may be anything, even inf.
    Returns:
      [B, T] float32, nats, exactly 0 off mask. Its mean is minus the KL of the student from the
      teacher; no token answers for later ones (a discount of 0).
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
    Source: K. Lu, "On-Policy Distillation" (2025), after arXiv:2306.13649.
    """
    logp, teacher_logp = masked.clean(mask, policy_logp, teacher_logp, rank=2)
    return jax.lax.stop_gradient(teacher_logp - logp)


def _groups(rewards: Array, is_valid: Array) -> Array:
    (rewards,) = masked.clean(is_valid, jax.lax.stop_gradient(rewards), rank=2)
    if rewards.shape[1] == 1:
        raise ValueError("group_size=1 gives no baseline; use at least 2")
    return rewards


def _is_spread(x: Array, where: Array, axis: masked.Axis) -> Array:
    highest = masked.max(x, where, axis, keepdims=True)
    return highest > masked.min(x, where, axis, keepdims=True)


def _centered(x: Array, where: Array, axis: masked.Axis) -> Array:
    # Compared, not computed: the rounding of the mean must not make an advantage of equal rewards.
    mean = masked.mean(x, where, axis, keepdims=True)
    return jnp.where(where & _is_spread(x, where, axis), x - mean, 0.0)
