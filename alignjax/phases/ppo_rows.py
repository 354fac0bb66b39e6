"""Host arrays of PPO: sequences into rows and back, texts beside them, figures and warnings."""

from collections.abc import Mapping, Sequence

import numpy as np

from alignjax.core.types import Sampling
from alignjax.phases.ppo_config import PpoAlgorithm
from alignjax.phases.rollouts import Tokens, sampler_warnings
from alignjax.rewards.rollout import Rollouts


def numbered(sequences: Sequence[Tokens], scores: np.ndarray) -> list[Tokens]:
    """The sequences with their number, `index`, and their score, `scores`, at each token."""
    return [
        {
            **one,
            "index": np.full(len(one["tokens"]), n, np.int32),
            "scores": np.full(len(one["tokens"]), score, np.float32),
        }
        for n, (one, score) in enumerate(zip(sequences, scores, strict=True))
    ]


def split(
    arrays: Mapping[str, np.ndarray], rows: Tokens, index: np.ndarray
) -> dict[str, list[np.ndarray]]:
    """Arrays over the tokens of rows -> for each name the arrays over each sequence's tokens.

    Args:
      arrays: of as many entries as `index`, in any shape.
      rows: `segment_ids` and `positions` of the rows.
      index: the number of the sequence that each token is of.
    """
    is_real = rows["segment_ids"].reshape(-1) > 0
    owners, positions = index.reshape(-1)[is_real], rows["positions"].reshape(-1)[is_real]
    order = np.lexsort((positions, owners))
    ends = np.cumsum(np.bincount(owners))[:-1]
    return {
        name: np.split(array.reshape(-1)[is_real][order], ends) for name, array in arrays.items()
    }


def with_texts(rows: Tokens, texts: Tokens) -> Tokens:
    """Rows [M, R, T] of rollouts, and after them those of texts, [M, R', T], with `ptx_weights`.

    The weight of a target of a text is the number of targets of rollouts over that of texts, in all
    micro-batches: 0 elsewhere.
    """
    weight = np.float32(rows["mask"].sum() / texts["mask"].sum())
    rows = {**rows, "ptx_weights": np.zeros(rows["mask"].shape, np.float32)}
    texts = {**texts, "ptx_weights": np.where(texts["mask"], weight, np.float32(0))}
    absent = {
        name: np.zeros(texts["mask"].shape, array.dtype)
        for name, array in rows.items()
        if name not in texts
    }
    both = {**texts, **absent}
    return {name: np.concatenate([array, both[name]], axis=1) for name, array in rows.items()}


def mean_sum(parts: Sequence[np.ndarray]) -> float:
    """The mean over sequences of the sum over their tokens."""
    return float(np.sum([part.sum(dtype=np.float64) for part in parts]) / len(parts))


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 one that says the mean,
    below 0 one that is worse than that. 0 where the returns are all equal."""
    spread = np.var(returns, dtype=np.float64)
    return float(1 - np.var(returns - values, dtype=np.float64) / spread) if spread > 0 else 0.0


def best_of_n(rollouts: Rollouts) -> dict[str, float]:
    """The best of the samples of each prompt by the reward, those without one left out: its reward,
    the parts of it, its length.

    The KL is the bound log n - (n - 1) / n (arXiv:2009.01325 app. G.3), nats for each completion.
    """
    rewards = rollouts.rewards
    n = rewards.shape[1]
    has_one = np.isfinite(rewards).any(1)
    filled = np.where(np.isfinite(rewards), rewards, -np.inf)
    best = filled.argmax(1)[has_one, None]
    is_valid = np.isfinite(rewards)

    def of_best(values: np.ndarray) -> float:
        found = np.take_along_axis(values[has_one], best, 1)
        return _mean(found[np.isfinite(found)])

    return {
        "eval/best_of_n/reward": of_best(rewards),
        "eval/best_of_n/mean_length": of_best(rollouts.completions.lengths.reshape(rewards.shape)),
        "eval/best_of_n/kl": float(np.log(n) - (n - 1) / n),
        "eval/best_of_n/reference_reward": _mean(rewards[is_valid]),
        **{f"eval/best_of_n/{name}": of_best(rollouts.part(name)) for name in rollouts.part_names},
    }


def diagnose(
    algorithm: PpoAlgorithm, sampling: Sampling, metrics: Mapping[str, float]
) -> list[str]:
    """Sentences on what looks wrong in the metrics of an iteration, each with the remedy."""
    found = []
    if "objective/kl" not in metrics:
        return ["no sample has a reward, so nothing can be learned: see samples.jsonl"]
    kl = metrics["objective/kl"]
    limit = max(100.0, 5 * (algorithm.kl_target or 0.0))
    if kl > limit:
        found.append(
            f"the KL from the first policy is {kl:.3g} nats for each completion: lower "
            "optimizer.learning_rate or raise algorithm.kl_coef, or use kl_control: adaptive"
        )
    if algorithm.kl_estimator == "k1" and kl < -5:
        found.append(
            f"the estimate of the KL is {kl:.3g}, which a KL cannot be: sampler and reference do "
            "not agree on what was sampled; use the same compute_dtype, or report it"
        )
    if metrics.get("policy/clipfrac_avg", 0.0) > 0.4:
        found.append(
            f"{metrics['policy/clipfrac_avg']:.0%} of the tokens are clipped: an iteration moves "
            "the policy too far; lower optimizer.learning_rate or algorithm.num_epochs"
        )
    if metrics["val/explained_variance"] < -0.5:
        found.append(
            f"the critic explains less than a constant would (val/explained_variance "
            f"{metrics['val/explained_variance']:.3g}): raise critic.learning_rate_scale or "
            "algorithm.value_coef; at the start of a run it has to find its level first"
        )
    if metrics["completions/clipped_ratio"] == 1:
        found.append(
            f"every completion was cut at rollout.max_tokens={sampling.max_tokens}: raise it, or "
            "check that the model knows EOS (rollout.stop_tokens)"
        )
    return found + sampler_warnings(metrics)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
