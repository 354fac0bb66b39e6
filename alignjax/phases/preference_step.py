"""Losses on comparisons -> updates of a policy: what the phases on preferences share."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from alignjax.core.precision import compute_dtype
from alignjax.core.types import Params, Weighted
from alignjax.models import load
from alignjax.phases.common import Policy
from alignjax.phases.preference_config import ObjectiveConfig
from alignjax.phases.preference_loss import (
    Scorer,
    mismatch_kl,
    pair_loss,
    reference_logps,
    single_loss,
)
from alignjax.phases.scoring import check_same_ids
from alignjax.sharding import batch_shards
from alignjax.train.optim import Optimizer
from alignjax.train.state import TrainState
from alignjax.train.step import Batch, Metric, finalize, make_evaluate, make_step


class RunningMean(NamedTuple):
    """Of the rewards seen so far, both kinds: `extra` of the state of a run with `bco`."""

    mean: Array
    """[] float32, reward units."""
    num_pairs: Array
    """[] float32."""


class Learner:
    """Updates and evaluations by the losses of a config.

    Attributes:
      objective: the losses.
      update: compiled; a `train.step.Step` on rows [M, R, T] with what `step` gives them.
      sums: compiled; parameters and such rows -> loss and metrics.
      kl: compiled; parameters and rows -> the KL that `kto` takes.
      reference_logps: compiled; a scorer, its weights and rows -> sums [M, R, N, 2].
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        policy: Policy,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        shared_prompt: bool,
    ):
        self.objective = config.objective
        self._config, self._policy, self._mesh = config, policy, mesh
        self._scorer = Scorer(
            policy.model, shared_prompt, batch_shards(mesh), config.length_alpha,
            with_log_collision="weights" in self.objective.takes,
        )  # fmt: skip
        loss = functools.partial(
            single_loss if self.objective.is_unpaired else pair_loss, self._scorer, self.objective
        )
        self.update = make_step(loss, optimizer, policy.frozen)
        self.sums = make_evaluate(loss)
        self.kl = make_evaluate(functools.partial(mismatch_kl, self._scorer))
        self._moved = jax.jit(_moved)
        self.reference_logps = jax.jit(reference_logps, static_argnums=0)

    @property
    def reference_scorer(self) -> Scorer:
        """Of the model that is trained: how rows are computed with the reference's weights."""
        return self._scorer._replace(with_log_collision=False)

    def reference(self, params: Params) -> tuple[Scorer, Params]:
        """What the policy is held to: its weights, and how rows are computed with them.

        Args:
          params: those that training starts from; they are returned, not copied, where they are the
            reference.
        """
        scorer = self.reference_scorer
        if (path := self._config.reference) is not None:
            check_same_ids("reference", path, self._policy.tokenizer)
            source = self._config.model
            platform = self._mesh.devices.flat[0].platform
            model, weights = load(
                path, mesh=self._mesh, param_dtype=source.param_dtype,
                compute_dtype=compute_dtype(source.compute_dtype, platform),
            )  # fmt: skip
            return scorer._replace(model=model), weights
        if self._policy.frozen is not None:
            return scorer._replace(model=self._policy.reference_model), self._policy.frozen
        return scorer, params

    def first_extra(self) -> RunningMean | None:
        """`extra` of a state before the first step."""
        if "delta" not in self.objective.takes:
            return None
        return RunningMean(jnp.zeros(()), jnp.zeros(()))

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update on rows [M, R, T]. `state` is donated."""
        given = self._given(state, batch)
        state, found = self.update(state, {**batch, **given})
        metrics = self.finished(found)
        if state.extra is not None:
            extra = self._moved(state.extra, metrics["delta"], batch["ranks"])
            state = state._replace(extra=extra)
        return state, metrics | {name: value[0] for name, value in given.items()}

    def evaluate(self, state: TrainState, batch: Batch) -> dict[str, Metric]:
        """Loss and metrics of rows [M, R, T], as sums."""
        given = self._given(state, batch)
        params = self._policy.whole(state.params)
        loss, metrics = self.sums(params, {**batch, **given})
        shown = {name: Weighted(value[0], jnp.ones(())) for name, value in given.items()}
        return {"loss": loss, **metrics, **shown}

    def finished(self, metrics: Mapping[str, Array]) -> dict[str, Array]:
        """With what is made of means: the margin between single responses of both kinds."""
        if "rewards/margins" in metrics:
            return dict(metrics)
        margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return {**metrics, "rewards/margins": margin}

    def _given(self, state: TrainState, batch: Batch) -> dict[str, Array]:
        """Numbers of the whole batch that a loss takes as given, [M] each: so the split into
        micro-batches changes nothing."""
        found: dict[str, Any] = {}
        if "kl" in self.objective.takes:
            found["kl"] = finalize(self.kl(self._policy.whole(state.params), batch)[0])
        if "delta" in self.objective.takes:
            found["delta"] = state.extra.mean
        num = len(batch["mask"])
        return {name: jnp.broadcast_to(value, num) for name, value in found.items()}


def _moved(state: RunningMean, mean: Array, ranks: Array) -> RunningMean:
    """With the rewards of a batch, whose mean is `mean`; one that is not finite is left out."""
    added = jnp.sum(jnp.all(ranks > 0, axis=-1), dtype=jnp.float32)
    num = state.num_pairs + added
    moved = RunningMean(state.mean + (mean - state.mean) * added / jnp.maximum(num, 1), num)
    return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(mean), new, old), moved, state)
