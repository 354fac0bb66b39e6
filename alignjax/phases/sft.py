"""Supervised fine-tuning and pretraining: the cross-entropy of completions or documents."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax.core.types import Params, Weighted
from alignjax.data import RecordIterator, Source, sequence_encoder, training_source
from alignjax.losses import TokenLogps, cross_entropy, token_mean
from alignjax.models import Model
from alignjax.models.moe import load_balancing_loss
from alignjax.phases.common import Policy, checked_rows, score_hidden, score_tokens
from alignjax.phases.corpus import CorpusConfig, dropout_key, means, text_rows, with_dropout
from alignjax.sharding import batch_shards, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import Optimizer, make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, Step, make_evaluate, make_step


class SftConfig(CorpusConfig):
    """`phase: sft`."""

    phase: Literal["sft"]


def sft_loss(
    model: Model, params: Params, batch: Batch, *, num_shards: int = 1
) -> tuple[Weighted, Metrics]:
    """Cross-entropy per target token, in nats, over token rows [R, T].

    Where the batch has a `dropout_seed`, adapters leave out some of their inputs.
    """
    key = dropout_key(batch)
    out = score_tokens(model, params, batch, num_shards=num_shards, dropout_key=key)
    return _cross_entropy(out, batch["mask"])


def balanced_sft_loss(
    model: Model, params: Params, batch: Batch, *, num_shards: int = 1
) -> tuple[Weighted, Metrics]:
    """As `sft_loss`, plus `router_aux_coef` times the loss that balances a model's experts.

    That one is of a micro-batch: like any product of two means it is not split into rows.
    """
    hidden, sums = model.apply_with_routing(
        params, batch["tokens"], batch["segment_ids"], batch["positions"], dropout_key(batch)
    )
    out = score_hidden(model, params, hidden, batch, num_shards=num_shards)
    loss, metrics = _cross_entropy(out, batch["mask"])
    balance = Weighted(load_balancing_loss(sums) * loss.weight, loss.weight)
    total = loss.total + model.config.router_aux_coef * balance.total
    return Weighted(total, loss.weight), {**metrics, "aux_loss": balance}


def _cross_entropy(out: TokenLogps, mask: Array) -> tuple[Weighted, Metrics]:
    loss = token_mean(cross_entropy(out.logps, mask), mask)
    assert out.entropies is not None
    return loss, {
        "entropy": token_mean(out.entropies, mask),
        "mean_token_accuracy": token_mean(out.is_argmax.astype(jnp.float32), mask),
    }


class Functions(NamedTuple):
    """What the phase compiles."""

    step: Step
    evaluate: Callable[[Params, Batch], tuple[Weighted, Metrics]]


def make_functions(
    model: Model, optimizer: Optimizer, mesh: Mesh, frozen: Params | None = None
) -> Functions:
    """Args: frozen: as of `make_step`."""
    num_shards = batch_shards(mesh)
    trained = balanced_sft_loss if model.config.num_experts else sft_loss
    return Functions(
        make_step(functools.partial(trained, model, num_shards=num_shards), optimizer, frozen),
        make_evaluate(functools.partial(sft_loss, model, num_shards=num_shards)),
    )


class Sft:
    """Implements `train.loop.Phase`."""

    shown = ("loss", "eval/loss")
    """The metrics that a terminal shows."""

    def __init__(self, config: SftConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        text, held_out = config.data.text, config.data.eval
        self._train = training_source(config.data.train, text)
        self._eval = None if held_out is None else training_source(held_out, text)
        self._optimizer = make_optimizer(config.optimizer, config.loop.steps)
        self._step, self._evaluate = make_functions(
            self._policy.model, self._optimizer, mesh, self._policy.frozen
        )

    def _rows(self, source: Source, **order: Any) -> RecordIterator[dict[str, np.ndarray]]:
        return text_rows(
            self._config,
            source,
            sequence_encoder(self._config.data.text, self._policy.tokenizer),
            rows=checked_rows(self._config.data.rows, self._mesh),
            **order,
        )

    def init(self, key: Array) -> TrainState:
        return create_state(self._policy.init(key), self._optimizer.transform, key)

    def records(self) -> Any:
        return self._rows(self._train)

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        batch = with_dropout(next(records), self._policy.model, state)
        return state, Collected(
            batches=[put_batch(batch, self._mesh, 1)],
            num_tokens=int(np.count_nonzero(batch["segment_ids"])),
            metrics={"epoch": records.epoch, "num_dropped": records.num_dropped},
        )

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._step(state, batch)

    def evaluate(self, state: TrainState) -> Evaluated:
        """Loss, entropy and accuracy per target token over all held-out records."""
        if self._eval is None:
            return Evaluated({})
        params = self._policy.whole(state.params)

        def found(batch: dict[str, np.ndarray]) -> Metrics:
            loss, metrics = self._evaluate(params, put_batch(batch, self._mesh, 1))
            return {"loss": loss, **metrics}

        return Evaluated(means(map(found, self._rows(self._eval, num_epochs=1, shuffle=False))))

    def diagnose(self, metrics: dict[str, float]) -> list[str]:
        return []

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)
