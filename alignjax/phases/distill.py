"""Distillation on given texts: a student learns the distributions of a teacher, token by token.

The teacher stands on the same mesh and reads each batch, or is asked once for its most likely
tokens, which are kept on disk. Source: arXiv:1503.02531, arXiv:2306.13649 (supervised KD).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.errors import UserError
from alignjax.core.types import Params, Weighted
from alignjax.data import RecordIterator, sequence_encoder, training_source
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model
from alignjax.models.lora import combine
from alignjax.phases.common import Policy, checked_rows, score_hidden
from alignjax.phases.corpus import dropout_key, means, text_rows, with_dropout
from alignjax.phases.distill_config import DistillConfig
from alignjax.phases.reference_logps import default_cache, weights_digest
from alignjax.phases.teacher import (
    Pair,
    compared,
    divergence_loss,
    load_teacher,
    token_metrics,
    with_teacher,
)
from alignjax.phases.teacher_top_k import Numbered, Rows, TopK, cached, numbered
from alignjax.sharding import batch_shards, fetch, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import make_optimizer
from alignjax.train.progress import Progress
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import (
    Batch,
    Metrics,
    make_evaluate,
    make_step,
    over_micro_batches,
)

ARRAYS = ("tokens", "mask", "positions", "segment_ids", "dropout_seed")
"""Of rows, what is brought to the devices."""


class Distill:
    """Implements `train.loop.Phase`."""

    shown = ("loss", "eval/loss", "eval/forward_kl", "eval/reverse_kl")
    """The metrics that a terminal shows."""

    def __init__(self, config: DistillConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        self._num_rows = checked_rows(config.data.rows, mesh)
        text = config.data.text
        specs = {"train": config.data.train, "eval": config.data.eval}
        self._sources = {
            split: Numbered(training_source(spec, text))
            for split, spec in specs.items()
            if spec is not None
        }
        self._encode = numbered(sequence_encoder(text, self._policy.tokenizer))
        self._optimizer = make_optimizer(config.optimizer, config.loop.steps)
        way = OnMesh if config.teacher.top_k is None else OnDisk
        self._teacher = way(config, self._policy, mesh)
        self._step = make_step(self._teacher.loss, self._optimizer, self._teacher.frozen)
        self._evaluate = make_evaluate(self._teacher.compared)

    def _rows(self, split: str, **order: Any) -> RecordIterator[dict[str, np.ndarray]]:
        return text_rows(
            self._config, self._sources[split], self._encode, rows=self._num_rows, **order
        )

    def _each_once(self, split: str) -> RecordIterator[dict[str, np.ndarray]]:
        return self._rows(split, num_epochs=1, shuffle=False)

    def init(self, key: Array) -> TrainState:
        state = create_state(self._policy.init(key), self._optimizer.transform, key)
        self._teacher.read(
            {
                split: (functools.partial(self._each_once, split), len(source))
                for split, source in self._sources.items()
            }
        )
        return state

    def records(self) -> Any:
        return self._rows("train")

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        batch = with_dropout(next(records), self._policy.model, state)
        return state, Collected(
            batches=[self._put("train", batch)],
            num_tokens=int(np.count_nonzero(batch["segment_ids"])),
            metrics={"epoch": records.epoch, "num_dropped": records.num_dropped},
        )

    def _put(self, split: str, batch: Rows) -> dict[str, Array]:
        """The rows on the devices, with what the teacher has said of them."""
        own = {name: batch[name] for name in ARRAYS if name in batch}
        return put_batch(own | self._teacher.said(split, batch), self._mesh, 1)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._step(state, batch)

    def evaluate(self, state: TrainState) -> Evaluated:
        """The loss and what else compares the two, per target token of all held-out records."""
        if "eval" not in self._sources:
            return Evaluated({})
        frozen = self._teacher.frozen
        params = state.params if frozen is None else combine(frozen, state.params)

        def found(batch: Rows) -> Metrics:
            loss, metrics = self._evaluate(params, self._put("eval", batch))
            return {"loss": loss, **metrics}

        return Evaluated(means(map(found, self._each_once("eval"))))

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        return []

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)


class OnMesh:
    """The teacher beside the student, in each step.

    Attributes:
      frozen: what does not train: the teacher, and the student's base under LoRA.
      loss, compared: of parameters, those of `frozen` included, and rows [R, T].
    """

    def __init__(self, config: DistillConfig, policy: Policy, mesh: Mesh):
        teacher = load_teacher(config.teacher, policy, mesh, config.data.row_len)
        pair = Pair.of(policy, teacher, mesh)
        self.frozen: Params | None = with_teacher(policy, teacher)
        self.loss = functools.partial(divergence_loss, pair, config.divergence)
        self.compared = functools.partial(compared, pair, config.divergence)

    def read(self, splits: Mapping[str, Any]) -> None:
        """Nothing is asked before training."""

    def said(self, split: str, batch: Rows) -> dict[str, np.ndarray]:
        return {}


class OnDisk:
    """What the teacher finds most likely, asked once and kept. Attributes as of `OnMesh`."""

    def __init__(self, config: DistillConfig, policy: Policy, mesh: Mesh):
        self._config, self._policy, self._mesh = config, policy, mesh
        self._found: dict[str, TopK] = {}
        self.frozen = policy.frozen
        arguments = policy.model, config.divergence.temperature, batch_shards(mesh)
        self.loss = functools.partial(top_k_loss, *arguments)
        self.compared = functools.partial(top_k_compared, *arguments)

    def read(self, splits: Mapping[str, Any]) -> None:
        """Asks the teacher, unless the files are there; see `teacher_top_k.cached`.

        Args:
          splits: of each what gives its rows, and the number of its records.
        """
        config = self._config
        teacher = load_teacher(config.teacher, self._policy, self._mesh, config.data.row_len)
        k, temperature = config.teacher.top_k, config.divergence.temperature
        width = min(m.config.vocab_size for m in (teacher.model, self._policy.model))
        assert k is not None
        if k >= width:
            raise UserError(
                f"teacher.top_k={k}: expected fewer than the {width} tokens of the vocabulary"
            )
        key = weights_digest(
            teacher.params,
            config=teacher.model.config.model_dump(mode="json"),
            compute_dtype=teacher.model.compute_dtype,
            attention=teacher.model.attention,
            device=self._mesh.devices.flat[0].device_kind,
            temperature=temperature,
            vocab_size=width,
        )
        ask = make_top_k(teacher.model, batch_shards(self._mesh), k, temperature, width)

        def compute(batch: Rows) -> tuple[np.ndarray, np.ndarray]:
            rows = {name: batch[name] for name in ARRAYS if name in batch}
            ids, logps = ask(teacher.params, put_batch(rows, self._mesh, 1))
            return fetch(ids), fetch(logps)

        where = config.teacher.cache_dir
        self._found = {
            split: cached(
                compute, rows, num_records, k, key=key,
                directory=default_cache().with_name("teacher") if where is None
                else Path(where).expanduser(),
                progress=Progress(title=config.name),
            )
            for split, (rows, num_records) in splits.items()
        }  # fmt: skip

    def said(self, split: str, batch: Rows) -> dict[str, np.ndarray]:
        """`teacher_ids` and `teacher_logps` [M, R, T, K]."""
        return self._found[split].of(batch)


def make_top_k(model: Model, num_shards: int, k: int, temperature: float, vocab_size: int) -> Any:
    """params, batch [M, R, T] -> ids and log-probs [M, R, T, K] of the most likely tokens where the
    targets are, jitted."""

    def top_k(params: Params, batch: Batch) -> tuple[Array, Array]:
        def micro(mb: Batch) -> tuple[Array, Array]:
            hidden, _ = model.apply(params, mb["tokens"], mb["segment_ids"], mb["positions"])
            out = losses.next_token_logps(
                hidden, model.unembedding(params), mb["tokens"], mb["mask"],
                temperature=temperature, soft_cap=model.config.logit_soft_cap,
                vocab_size=vocab_size, top_k=k,
                chunk_size=default_chunk_size(len(mb["tokens"]) // num_shards),
            )  # fmt: skip
            assert out.top_ids is not None and out.top_logps is not None
            return out.top_ids, out.top_logps

        return over_micro_batches(micro, batch)

    return jax.jit(top_k)


def top_k_loss(
    model: Model, temperature: float, num_shards: int, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """The KL from the teacher's most likely tokens and the rest as one, per target token, in nats,
    over token rows [R, T]."""
    return _top_k(model, temperature, num_shards, params, batch)[0], {}


def top_k_compared(
    model: Model, temperature: float, num_shards: int, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """As `top_k_loss`, with what the student thinks of the tokens that are there."""
    loss, hidden = _top_k(model, temperature, num_shards, params, batch)
    out = score_hidden(model, params, hidden, batch, num_shards=num_shards)
    return loss, token_metrics(out, batch["mask"])


def _top_k(
    model: Model, temperature: float, num_shards: int, params: Params, batch: Batch
) -> tuple[Weighted, Array]:
    mask = batch["mask"]
    rows = batch["tokens"], batch["segment_ids"], batch["positions"]
    hidden, _ = model.apply(params, *rows, dropout_key=dropout_key(batch))
    loss = losses.top_k_forward_kl(
        hidden, model.unembedding(params), batch["teacher_ids"], batch["teacher_logps"], mask,
        temperature=temperature, soft_cap=model.config.logit_soft_cap,
        chunk_size=default_chunk_size(mask.shape[0] // num_shards),
    )  # fmt: skip
    return losses.token_mean(loss, mask), hidden
