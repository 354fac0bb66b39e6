"""Supervised fine-tuning and pretraining: the cross-entropy of completions or documents."""

import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.keys import named_key
from alignjax.core.types import Params, Weighted
from alignjax.data import (
    RecordIterator,
    Source,
    TextConfig,
    sequence_encoder,
    token_rows,
    training_source,
)
from alignjax.losses import TokenLogps, cross_entropy, token_mean
from alignjax.models import Model
from alignjax.models.moe import load_balancing_loss
from alignjax.phases.common import PhaseConfig, Policy, rows_per_process, score_hidden, score_tokens
from alignjax.sharding import batch_shards, put_batch
from alignjax.text import HFTokenizer
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, finalize, make_evaluate, make_step, merge


class SftData(Config):
    """What is trained on, and in what shape."""

    train: str | list[str]
    """A .jsonl, .parquet or .array_record file, a saved data set, tfds:NAME/SPLIT or hf:NAME/SPLIT;
    several follow each other."""
    eval: str | list[str] | None = None
    """Held-out records, of the same form."""
    text: TextConfig
    row_len: int = Field(512, ge=2)
    """Tokens in a row."""
    rows: int = Field(16, ge=1)
    """Rows in a micro-batch, over all devices."""
    micro_batches: int = Field(1, ge=1)
    """Micro-batches in an update; their gradients are added up."""
    packed: bool = True
    """Lay several examples into a row; they do not see each other."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with an example longer than a row. It is never cut."""


class SftConfig(PhaseConfig):
    """`phase: sft`."""

    phase: Literal["sft"]
    data: SftData


def sft_rows(
    config: SftConfig, tokenizer: HFTokenizer, source: Source, *, rows: int, **order: Any
) -> RecordIterator[dict[str, np.ndarray]]:
    """Batches of what is trained on: `rows` in each micro-batch; see `token_rows` for `order`."""
    data = config.data
    return token_rows(
        source,
        sequence_encoder(data.text, tokenizer),
        num_micro_batches=data.micro_batches,
        rows=rows,
        row_len=data.row_len,
        packed=data.packed,
        overlong=data.overlong,
        seed=config.seed,
        **order,
    )


def sft_loss(
    model: Model, params: Params, batch: Batch, *, num_shards: int = 1
) -> tuple[Weighted, Metrics]:
    """Cross-entropy per target token, in nats, over token rows [R, T].

    Where the batch has a `dropout_seed`, adapters leave out some of their inputs.
    """
    key = _dropout_key(batch)
    out = score_tokens(model, params, batch, num_shards=num_shards, dropout_key=key)
    return _cross_entropy(out, batch["mask"])


def balanced_sft_loss(
    model: Model, params: Params, batch: Batch, *, num_shards: int = 1
) -> tuple[Weighted, Metrics]:
    """As `sft_loss`, plus `router_aux_coef` times the loss that balances a model's experts.

    That one is of a micro-batch: like any product of two means it is not split into rows.
    """
    hidden, sums = model.apply_with_routing(
        params, batch["tokens"], batch["segment_ids"], batch["positions"], _dropout_key(batch)
    )
    out = score_hidden(model, params, hidden, batch, num_shards=num_shards)
    loss, metrics = _cross_entropy(out, batch["mask"])
    balance = Weighted(load_balancing_loss(sums) * loss.weight, loss.weight)
    total = loss.total + model.config.router_aux_coef * balance.total
    return Weighted(total, loss.weight), {**metrics, "aux_loss": balance}


def _dropout_key(batch: Batch) -> Array | None:
    seed = batch.get("dropout_seed")
    return None if seed is None else jax.random.key(seed)


def _cross_entropy(out: TokenLogps, mask: Array) -> tuple[Weighted, Metrics]:
    loss = token_mean(cross_entropy(out.logps, mask), mask)
    assert out.entropies is not None
    return loss, {
        "entropy": token_mean(out.entropies, mask),
        "mean_token_accuracy": token_mean(out.is_argmax.astype(jnp.float32), mask),
    }


class Sft:
    """Implements `train.loop.Phase`."""

    shown = ("loss", "eval/loss")
    """The metrics that a terminal shows."""

    def __init__(self, config: SftConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        model = self._policy.model
        text, held_out = config.data.text, config.data.eval
        self._train = training_source(config.data.train, text)
        self._eval = None if held_out is None else training_source(held_out, text)
        self._optimizer = make_optimizer(config.optimizer, config.loop.steps)

        num_shards = batch_shards(mesh)
        trained = balanced_sft_loss if model.config.num_experts else sft_loss
        self._step = make_step(
            functools.partial(trained, model, num_shards=num_shards),
            self._optimizer,
            self._policy.frozen,
        )
        self._evaluate = make_evaluate(functools.partial(sft_loss, model, num_shards=num_shards))

    def _rows(self, source: Source, **order: Any) -> RecordIterator[dict[str, np.ndarray]]:
        return sft_rows(
            self._config,
            self._policy.tokenizer,
            source,
            rows=rows_per_process(self._config.data.rows, self._mesh),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **order,
        )

    def init(self, key: Array) -> TrainState:
        return create_state(self._policy.init(key), self._optimizer.transform, key)

    def records(self) -> Any:
        return self._rows(self._train)

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        batch = next(records)
        if self._policy.model.lora is not None and self._policy.model.lora.dropout > 0:
            key = named_key(state.key, "dropout", int(state.step))
            seeds = jax.random.bits(key, (len(batch["tokens"]),), np.uint32)
            batch = {**batch, "dropout_seed": np.asarray(seeds)}
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
        sums: dict[str, Any] = {}
        params = self._policy.whole(state.params)
        for batch in self._rows(self._eval, num_epochs=1, shuffle=False):
            loss, metrics = self._evaluate(params, put_batch(batch, self._mesh, 1))
            new = {"loss": loss, **metrics}
            sums = {k: merge(sums[k], new[k]) if sums else new[k] for k in new}
        return Evaluated({f"eval/{k}": float(finalize(v)) for k, v in sums.items()})

    def diagnose(self, metrics: dict[str, float]) -> list[str]:
        return []

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)
