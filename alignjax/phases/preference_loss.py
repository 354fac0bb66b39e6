"""Rows of comparisons -> losses of completions against each other, and the metrics of them.

Each comparison has two completions. Of pairs the first is the chosen one; of single responses the
first is the one that is judged, and the second is of another prompt.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from alignjax import losses
from alignjax.core.types import Params, Weighted
from alignjax.data import branch_segments
from alignjax.losses import Pairs, SequenceLogps, TokenLogps
from alignjax.models import Model
from alignjax.phases.common import score_tokens
from alignjax.phases.comparisons import per_element, token_rows_of
from alignjax.phases.preference_config import Objective
from alignjax.train.step import Batch, Metrics, over_micro_batches

K = 2
"""Completions of a comparison."""
ARRAYS = ("tokens", "mask", "positions", "segment_ids", "branches", "ranks", "labels")
"""Of the rows of comparisons, those that are read here; [R, T], and [R, N, ...] from ranks on."""


class Scorer(NamedTuple):
    """How rows are computed, whatever the weights."""

    model: Model
    shared_prompt: bool
    num_shards: int
    length_alpha: float = 1.0
    with_log_collision: bool = False


def completion_logps(
    scorer: Scorer, params: Params, batch: Batch
) -> tuple[SequenceLogps, TokenLogps, Array]:
    """Rows [R, T] of N comparisons each -> SequenceLogps of [R, N, 2].

    Below length_alpha 1 they are those of `length_desensitized_logps`.

    Returns:
      Also what they are sums of, [R, T], and the segments [R, T] of the completions.
    """
    rows = token_rows_of(batch, K, shared_prompt=scorer.shared_prompt)
    out = score_tokens(
        scorer.model, params, rows,
        num_shards=scorer.num_shards, with_entropy=False,
        with_log_collision=scorer.with_log_collision,
    )  # fmt: skip
    mask, segments = batch["mask"], branch_segments(batch, K)
    num_segments = batch["ranks"].shape[1] * K
    logps = out.logps
    if scorer.length_alpha < 1:
        ones = jnp.ones(mask.shape, jnp.float32)
        lengths = losses.sequence_logps(ones, mask, segments, num_segments=num_segments).lengths
        shared = jnp.min(per_element(lengths, batch), axis=-1)
        owner = jnp.maximum(batch["segment_ids"] - 1, 0)
        shared_len = jnp.take_along_axis(shared, owner, axis=1)
        logps = losses.length_desensitized_logps(
            logps, mask, segments, shared_len, alpha=scorer.length_alpha
        )
    found = losses.sequence_logps(logps, mask, segments, num_segments=num_segments)
    return SequenceLogps(*(per_element(x, batch) for x in found)), out, segments


def reference_logps(scorer: Scorer, params: Params, batch: Batch) -> Array:
    """[M, R, T] -> sums [M, R, N, 2] float32, nats; 0 where there is no completion."""

    return over_micro_batches(lambda mb: completion_logps(scorer, params, mb)[0].sums, batch)


def pair_loss(
    scorer: Scorer, objective: Objective, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """The losses of chosen completions against rejected ones, summed over pairs.

    Args:
      batch: rows of comparisons, [R, T] and [R, N, ...], with what the objective takes: `ref_logps`
        [R, N, 2] of `reference_logps`; `preference_prob` [R, N] float32; `delta` [] float32.
    """
    found, out, segments = completion_logps(scorer, params, batch)
    inputs = pair_inputs(found, batch)
    if scorer.with_log_collision:
        inputs["weights"] = _pair_weights(found, out, batch["mask"], segments)
    pairs = inputs["pairs"]
    is_ranked = (batch["ranks"][..., 0] != batch["ranks"][..., 1]).reshape(-1)
    ranked = pairs._replace(is_valid=pairs.is_valid & is_ranked)
    return _summed(objective, inputs, pairs.is_valid), pair_metrics(objective, ranked)


def single_loss(
    scorer: Scorer, objective: Objective, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """The losses of single completions, summed over them.

    Args:
      batch: as of `pair_loss`, with `ref_logps`, `labels` [R, N] bool and `kl` [] float32.
    """
    found, *_ = completion_logps(scorer, params, batch)
    inputs = single_inputs(found, batch)
    lengths = found.lengths[..., 0].reshape(-1)
    metrics = single_metrics(objective, inputs, lengths)
    return _summed(objective, inputs, inputs["is_valid"]), metrics


def mismatch_kl(scorer: Scorer, params: Params, batch: Batch) -> tuple[Weighted, Metrics]:
    """`kto_kl` of the second completions of the comparisons, which are of other prompts."""
    sums, _, is_valid = completion_logps(scorer, params, batch)[0]
    columns = (x[..., 1].reshape(-1) for x in (sums, batch["ref_logps"], is_valid))
    return losses.kto_kl(*columns), {}


def pair_inputs(found: SequenceLogps, batch: Batch) -> dict[str, Any]:
    """What losses of pairs may take, but for weights: an entry for each of R N pairs."""
    ref = batch.get("ref_logps", jnp.zeros(found.sums.shape))
    columns = [x[..., k].reshape(-1) for x in (found.sums, ref, found.lengths) for k in range(K)]
    inputs: dict[str, Any] = {"pairs": Pairs(*columns, jnp.all(found.is_valid, -1).reshape(-1))}
    if "preference_prob" in batch:
        inputs["preference_prob"] = batch["preference_prob"].reshape(-1)
    if "delta" in batch:
        inputs["delta"] = batch["delta"]
    return inputs


def single_inputs(found: SequenceLogps, batch: Batch) -> dict[str, Array]:
    """What losses of single completions may take: an entry for each of R N of them."""
    columns = {
        "logps": found.sums[..., 0],
        "ref_logps": batch["ref_logps"][..., 0],
        "is_desirable": batch["labels"],
        "is_valid": found.is_valid[..., 0],
    }
    return {name: x.reshape(-1) for name, x in columns.items()} | {"kl": batch["kl"]}


def pair_metrics(objective: Objective, pairs: Pairs) -> Metrics:
    """Of the rewards of the first loss: beta times what it compares, without the reference the
    log-probs themselves, sums or means over tokens. Equal rewards are half right."""
    first = objective.parts[0].loss
    if not first.reads_reference:
        pairs = pairs._replace(
            ref_chosen=jnp.zeros_like(pairs.chosen), ref_rejected=jnp.zeros_like(pairs.rejected)
        )
    chosen, rejected = losses.implicit_rewards(pairs, beta=objective.beta)
    metrics: dict[str, Any] = {}
    for part in objective.parts:
        if "delta" in part.loss.takes:  # The mean that `bco` centres its rewards by.
            both = losses.implicit_rewards(pairs, beta=part.options["beta"])
            metrics["delta"] = _mean(jnp.stack(both), jnp.stack([pairs.is_valid] * K))
    if first.per_token:
        chosen = chosen / jnp.maximum(pairs.chosen_len, 1)
        rejected = rejected / jnp.maximum(pairs.rejected_len, 1)
    is_right = jnp.where(chosen == rejected, 0.5, (chosen > rejected).astype(jnp.float32))
    num_tokens = jnp.sum(jnp.where(pairs.is_valid, pairs.chosen_len, 0))
    logps = [jax.lax.stop_gradient(x) for x in (pairs.chosen, pairs.rejected)]
    nll = -jnp.sum(logps[0], where=pairs.is_valid)
    return metrics | {
        "rewards/chosen": _mean(chosen, pairs.is_valid),
        "rewards/rejected": _mean(rejected, pairs.is_valid),
        "rewards/accuracies": _mean(is_right, pairs.is_valid),
        "rewards/margins": _mean(chosen - rejected, pairs.is_valid),
        "logps/chosen": _mean(logps[0], pairs.is_valid),
        "logps/rejected": _mean(logps[1], pairs.is_valid),
        "nll_loss": Weighted(nll, num_tokens.astype(jnp.float32)),
    }


def single_metrics(objective: Objective, inputs: Mapping[str, Array], lengths: Array) -> Metrics:
    """The same of desirable completions (chosen) and undesirable ones (rejected)."""
    logps = jax.lax.stop_gradient(inputs["logps"])
    gains = logps - inputs["ref_logps"]
    is_valid, is_desirable = inputs["is_valid"], inputs["is_desirable"]
    is_chosen, is_rejected = is_valid & is_desirable, is_valid & ~is_desirable
    is_right = (gains > jnp.maximum(inputs["kl"], 0.0)) == is_desirable
    num_tokens = jnp.sum(jnp.where(is_chosen, lengths, 0))
    return {
        "rewards/chosen": _mean(objective.beta * gains, is_chosen),
        "rewards/rejected": _mean(objective.beta * gains, is_rejected),
        "rewards/accuracies": _mean(is_right, is_valid),
        "logps/chosen": _mean(logps, is_chosen),
        "logps/rejected": _mean(logps, is_rejected),
        "nll_loss": Weighted(-jnp.sum(logps, where=is_chosen), num_tokens.astype(jnp.float32)),
    }


def _summed(objective: Objective, inputs: dict[str, Any], is_valid: Array) -> Weighted:
    total = sum((part.weight * part(inputs) for part in objective.parts), jnp.zeros(()))
    return Weighted(jnp.sum(total), jnp.sum(is_valid, dtype=jnp.float32))


def _mean(values: Array, is_valid: Array) -> Weighted:
    values = values.astype(jnp.float32)
    return Weighted(jnp.sum(values, where=is_valid), jnp.sum(is_valid, dtype=jnp.float32))


def _pair_weights(found: SequenceLogps, out: TokenLogps, mask: Array, segments: Array) -> Array:
    """Of `wpo`, [R N]."""
    assert out.log_collisions is not None
    num_segments = found.sums.shape[1] * K
    weights = losses.wpo_weights(
        out.logps, out.log_collisions, mask, segments, num_segments=num_segments
    )
    return jnp.prod(weights.reshape(-1, K), axis=-1)
