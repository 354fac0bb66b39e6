"""Reward models: scores of whole responses, learned from which of them people preferred."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core import masked
from alignjax.core.errors import UserError
from alignjax.core.types import Maximum, Minimum, Params, Weighted
from alignjax.data import (
    RecordIterator,
    View,
    all_responses,
    branch_segments,
    open_preferences,
    rankings,
)
from alignjax.models import ScalarModel
from alignjax.phases.comparisons import batches
from alignjax.phases.pair_quality import pair_quality
from alignjax.phases.reward_config import OBJECTIVES, ObjectiveConfig, RewardPhaseConfig
from alignjax.phases.reward_model import RewardModel, score_elements
from alignjax.phases.scoring import MOMENTS
from alignjax.sharding import fetch, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import Optimizer, make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, Step, make_step, over_micro_batches


def reward_loss(
    model: ScalarModel,
    params: Params,
    batch: Batch,
    objective: ObjectiveConfig,
    *,
    shared_prompt: bool,
) -> tuple[Weighted, Metrics]:
    """The objective per element, in nats, over rows of comparisons; metrics leave ties out."""
    shape = (-1, batch["ranks"].shape[-1])
    scores = score_elements(model, params, batch, shared_prompt=shared_prompt).reshape(shape)
    ranks = batch["ranks"].reshape(shape)
    is_valid, margins = ranks > 0, batch["margins"].reshape(-1)
    is_ranked, chosen = losses.is_comparable(ranks, is_valid), OBJECTIVES[objective.name]
    loss = chosen.loss(scores, ranks, is_valid, margins, **objective.options)
    loss = loss + objective.score_coef * masked.mean(scores**2, is_valid, 1)
    difference = scores[:, :, None] - scores[:, None, :]
    is_pair = is_valid[:, :, None] & is_valid[:, None, :]
    is_pair &= ranks[:, :, None] < ranks[:, None, :]
    is_right = jnp.where(difference == 0, 0.5, (difference > 0).astype(jnp.float32))
    metrics = {
        "accuracy": losses.example_mean(masked.mean(is_right, is_pair, (1, 2)), is_ranked),
        "margin": losses.example_mean(masked.mean(difference, is_pair, (1, 2)), is_ranked),
        "min_reward": Minimum(masked.min(scores, is_valid)),
        "mean_reward": losses.example_mean(scores, is_valid),
        "max_reward": Maximum(masked.max(scores, is_valid)),
    }
    return losses.example_mean(loss, chosen.counts(ranks, is_valid)), metrics


class Functions(NamedTuple):
    """What the phase compiles."""

    step: Step
    scores: Callable[[Params, Batch], Array]
    """Of all parameters and rows of comparisons [M, R, T]: scores [M, R, N, K]."""


def make_functions(
    config: RewardPhaseConfig,
    model: ScalarModel,
    optimizer: Optimizer,
    frozen: Params | None = None,
) -> Functions:
    """Args: frozen: as of `make_step`."""
    shared = config.data.shared_prompt

    def loss(params: Params, batch: Batch) -> tuple[Weighted, Metrics]:
        return reward_loss(model, params, batch, config.objective, shared_prompt=shared)

    def scores(params: Params, batch: Batch) -> Array:
        return over_micro_batches(
            lambda mb: score_elements(model, params, mb, shared_prompt=shared), batch
        )

    return Functions(make_step(loss, optimizer, frozen), jax.jit(scores))


class Reward:
    """Implements `train.loop.Phase`."""

    shown = ("loss", "accuracy", "eval/loss", "eval/accuracy")

    def __init__(self, config: RewardPhaseConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._reward = RewardModel(config, mesh)
        data, objective = config.data, config.objective
        train = data.open(data.train)
        self._train = config.view(train)
        if OBJECTIVES[objective.name].of_pairs and self._train.num_responses > 2:
            raise UserError(
                f"objective.name={objective.name!r} takes two responses, but there are up to "
                f"{self._train.num_responses} of a prompt; use kwise, which is the same loss on "
                'all pairs of a prompt at once, or set data.pairs to "all" or "best_worst"'
            )
        held_out = None if data.eval is None else data.open(data.eval)
        self._eval = None if held_out is None else rankings(held_out)
        self._num_faulty = train.num_faulty
        if data.reference is not None:
            held_out = open_preferences(data.reference, data.reference_layout, faulty=data.faulty)
        self._reference = all_responses(train if held_out is None else held_out)
        self._optimizer = make_optimizer(config.optimizer, config.loop.steps)
        self._step, self._scores = make_functions(
            config, self._reward.model, self._optimizer, self._reward.frozen
        )

    def init(self, key: Array) -> TrainState:
        return create_state(self._reward.init(key), self._optimizer.transform, key)

    def records(self) -> Any:
        return self._rows(self._train)

    def _rows(self, view: View, **order: Any) -> RecordIterator[dict[str, np.ndarray]]:
        return batches(
            self._config.data,
            view,
            self._reward.tokenizer,
            self._mesh,
            context=self._reward.model.decoder.config.max_position_embeddings,
            num_responses=view.num_responses,
            seed=self._config.seed,
            **order,
        )

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        batch = next(records)
        warnings = []
        if int(state.step) == 0 and self._reward.pad_id in self._reward.eos_ids:
            warnings.append(
                "the tokenizer pads with the token that ends a response, and has no other: where "
                "transformers scores the exported model, it looks at the token before that one"
            )
        return state, Collected(
            batches=[put_batch(batch, self._mesh, 1)],
            num_tokens=int(np.count_nonzero(batch["segment_ids"])),
            metrics={
                "epoch": records.epoch,
                "num_dropped": records.num_dropped,
                "num_faulty": self._num_faulty,
                "num_left_out": self._train.num_left_out,
            },
            warnings=warnings,
        )

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._step(state, batch)

    def evaluate(self, state: TrainState) -> Evaluated:
        """How well scores agree with the ranks of all held-out prompts; see `pair_quality`."""
        if self._eval is None:
            return Evaluated({})
        found = self._scored(state.params, self._eval)
        metrics = pair_quality(*found) | {"num_dropped": float(len(self._eval) - len(found[0]))}
        return Evaluated({f"eval/{name}": value for name, value in metrics.items()})

    def _scored(self, params: Params, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, ranks and lengths of all elements of a view that fit: [P, K] each."""
        whole = self._reward.whole(params)
        found: list[tuple[np.ndarray, ...]] = []
        for batch in self._rows(view, num_epochs=1, shuffle=False):
            scores = fetch(self._scores(whole, put_batch(batch, self._mesh, 1)))
            is_there = batch["index"] >= 0
            arrays = (scores, batch["ranks"], completion_lengths(batch))
            found.append(tuple(array[is_there] for array in arrays))
        if not found:
            raise UserError(
                f"data: {view.where(0)} and all others are too long to be scored; raise "
                "data.row_len"
            )
        scores, ranks, lengths = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return scores, ranks, lengths

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        largest = max(abs(metrics["min_reward"]), abs(metrics["max_reward"]))
        if largest > 100:
            return [
                f"scores reach {largest:.3g}: only their differences are learned, and they drift "
                "or grow; lower optimizer.learning_rate, or set objective.score_coef to 0.01"
            ]
        return []

    def export(self, state: TrainState, path: Path) -> None:
        self.write(state.params, path)

    def write(self, params: Params, path: Path, **files: Any) -> None:
        """Writes the model with its tokenizer, and in reward.json mean and standard deviation of
        the scores of the reference responses, and their number; `files` as of `RewardModel`."""
        scores, ranks, _ = self._scored(params, self._reference)
        values = scores[ranks > 0].astype(np.float64)
        stated = {"mean": float(values.mean()), "std": float(values.std()), "num": len(values)}
        text = json.dumps(stated, indent=2)
        self._reward.export(params, path, {MOMENTS: text + "\n"}, **files)

    @staticmethod
    def exporter(config: RewardPhaseConfig, mesh: Mesh) -> "Exporter":
        """What writes the model of a checkpoint."""
        return Exporter(config, mesh)


class Exporter:
    """Writes params of a checkpoint, as `Policy` does for other phases."""

    def __init__(self, config: RewardPhaseConfig, mesh: Mesh):
        self._phase = Reward(config, mesh)
        self.init = self._phase._reward.init
        self.export = self._phase.write
        self.export_adapter = self._phase._reward.export_adapter


def completion_lengths(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """[M, R, N, K] int, tokens: of each completion, its stop token included; 0 where is none."""
    ranks = batch["ranks"]
    num_rows, num_segments = ranks.shape[0] * ranks.shape[1], ranks.shape[2] * ranks.shape[3]
    segments = branch_segments(batch, ranks.shape[3]).reshape(num_rows, -1)
    mask = batch["mask"].reshape(num_rows, -1)
    counted = [
        np.bincount(row[on], minlength=num_segments + 1)[1:]
        for row, on in zip(segments, mask, strict=True)
    ]
    return np.array(counted).reshape(ranks.shape)
