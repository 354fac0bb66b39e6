"""Log-probs, values and scores of rollouts -> advantages and returns; and these -> PPO's loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax import losses
from alignjax.core.types import Params, Weighted
from alignjax.losses.ratio import capped_exp, token_log_ratio
from alignjax.models import Model
from alignjax.phases.common import score_hidden
from alignjax.phases.critic import Critic, state_values
from alignjax.phases.ppo_config import PpoAlgorithm
from alignjax.phases.rollouts import sampler_metrics, weight_metrics
from alignjax.train.step import Batch, Metrics


class Experience(NamedTuple):
    """What an iteration has seen, by token: [B, T] float32, exactly 0 off mask."""

    kl: Array
    """Nats; the estimate against the first policy."""
    returns: Array
    """Reward units."""
    advantages: Array
    """Whitened, if the algorithm says so."""


def experience(
    algorithm: PpoAlgorithm,
    old_logps: Array,
    ref_logps: Array,
    old_values: Array,
    scores: Array,
    mask: Array,
    segment_ids: Array,
    kl_coef: Array,
) -> Experience:
    """Rewards with the KL of each token, GAE and whitening, over all rollouts of an iteration.

    An episode ends with its last token, whether that is a stop token or the limit cut it there: the
    score is of the text that there is, and no value follows.

    Args:
      algorithm: hyperparameters.
      old_logps, ref_logps: [B, T] float32, nats; of the policy that sampled, and of the first one.
      old_values: [B, T] float32, reward units; of the states in which the tokens were chosen.
      scores: [B, T] float32, reward units; a completion's, read at its last token.
      mask: [B, T] bool; True on completion tokens.
      segment_ids: [B, T] int32; the sequence of each token within its row.
      kl_coef: [] float32; reward units for each nat.
    Source: arXiv:2203.02155 sec. 3.5; arXiv:1506.02438 eq. 16. Whitening is over the whole of what
      is given, after the returns were made; of rewards it keeps the mean.
    """
    kl = losses.KL_ESTIMATORS[algorithm.kl_estimator](old_logps, old_logps, ref_logps, mask)
    rewards = losses.token_rewards(scores, kl, mask, segment_ids, kl_coef=kl_coef)
    if algorithm.whiten_rewards:
        rewards = losses.global_whiten(rewards, mask, shift_mean=False)
    found = losses.gae(
        rewards, old_values, jnp.zeros_like(rewards), mask, segment_ids,
        gamma=algorithm.gamma, gae_lambda=algorithm.gae_lambda,
    )  # fmt: skip
    advantages = found.advantages
    if algorithm.whiten_advantages:
        advantages = losses.global_whiten(advantages, mask)
    return Experience(kl, found.returns, advantages)


def ppo_loss(
    model: Model,
    critic: Critic,
    params: Params,
    batch: Batch,
    algorithm: PpoAlgorithm,
    *,
    temperature: float,
    num_shards: int = 1,
) -> tuple[Weighted, Metrics]:
    """Clipped surrogate + value_coef x clipped value loss, over the tokens of rollouts.

    Where the batch has `ptx_weights`, rows with a weight above 0 are texts: ptx_coef times their
    cross-entropy, weighted, is added to the sum. The weights are such that after the division by
    the tokens of rollouts it is the mean over the tokens of texts.
    """
    hidden, _ = model.apply(
        params["policy"], batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    texts = batch.get("ptx_weights")
    mask = batch["mask"] if texts is None else batch["mask"] & (texts == 0)
    out = score_hidden(
        model, params["policy"], hidden, {**batch, "mask": mask},
        num_shards=num_shards, temperature=temperature,
    )  # fmt: skip
    old_logps = batch["old_logps"]
    policy = losses.policy_loss(
        algorithm.algorithm,
        out.logps,
        old_logps,
        None,
        batch["advantages"],
        mask,
        batch["segment_ids"],
        max_len=mask.shape[1],
        rollout_logp=batch.get("sampler_logps"),
    )
    values = state_values(critic.values(params, batch, hidden))
    value = losses.clipped_value_loss(
        values, batch["old_values"], batch["returns"], mask, clip=algorithm.value_clip
    )
    value_mean = losses.token_mean(value.loss, mask)
    total = policy.loss.total + algorithm.value_coef * value_mean.total
    log_ratio = jax.lax.stop_gradient(token_log_ratio(out.logps, old_logps, mask))
    assert out.entropies is not None
    metrics = {
        "entropy": losses.token_mean(out.entropies, mask),
        "policy/approxkl_avg": losses.token_mean(0.5 * log_ratio**2, mask),
        "policy/clipfrac_avg": losses.token_mean(_float(policy.surrogate.is_clipped), mask),
        "loss/policy_avg": policy.loss,
        "loss/value_avg": value_mean,
        "val/clipfrac_avg": losses.token_mean(_float(value.is_clipped), mask),
        "val/ratio": losses.token_mean(capped_exp(log_ratio), mask),
        **sampler_metrics(out.logps, batch.get("sampler_logps", old_logps), mask),
        **weight_metrics(policy.weights, algorithm.importance_cap, mask),
    }
    if texts is not None:
        of_texts = batch["mask"] & (texts > 0)
        logps = score_hidden(
            model, params["policy"], hidden, {**batch, "mask": of_texts},
            num_shards=num_shards, with_entropy=False,
        ).logps  # fmt: skip
        nll = losses.cross_entropy(logps, of_texts)
        total = total + algorithm.ptx_coef * jnp.sum(texts * nll)
        metrics["loss/ptx_avg"] = losses.token_mean(nll, of_texts)
    return Weighted(total, policy.loss.weight), metrics


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)
