"""Texts of files -> rows to train on and held-out ones: what phases on given texts share."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.keys import named_key
from alignjax.data import RecordIterator, Source, TextConfig, token_rows
from alignjax.models import Model
from alignjax.phases.common import PhaseConfig
from alignjax.sharding import fetch
from alignjax.train.state import TrainState
from alignjax.train.step import Batch, Metric, finalize, merge


class TextData(Config):
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


class CorpusConfig(PhaseConfig):
    """What the configs of phases share that train on texts as they are given."""

    data: TextData


def text_rows(
    config: CorpusConfig,
    source: Source,
    encode: Callable[[Any], dict[str, np.ndarray]],
    *,
    rows: int,
    **order: Any,
) -> RecordIterator[dict[str, np.ndarray]]:
    """Batches of what is trained on: `rows` in each micro-batch; see `token_rows` for the others.

    Args:
      encode: a record of the source -> its tokens, such as `data.sequence_encoder`.
    """
    data = config.data
    return token_rows(
        source,
        encode,
        num_micro_batches=data.micro_batches,
        rows=rows,
        row_len=data.row_len,
        packed=data.packed,
        overlong=data.overlong,
        seed=config.seed,
        **order,
    )


def with_dropout(
    batch: Mapping[str, np.ndarray], model: Model, state: TrainState
) -> Mapping[str, np.ndarray]:
    """The batch [M, R, T] with a `dropout_seed` [M], where the model's adapters drop inputs."""
    if model.lora is None or model.lora.dropout == 0:
        return batch
    step, key = state.on_host()
    seeds = jax.random.bits(named_key(key, "dropout", step), (len(batch["tokens"]),), np.uint32)
    return {**batch, "dropout_seed": np.asarray(seeds)}


def dropout_key(batch: Batch) -> Array | None:
    """Of a micro-batch of `with_dropout`; None: nothing is dropped."""
    seed = batch.get("dropout_seed")
    return None if seed is None else jax.random.key(seed)


def means(found: Iterable[Mapping[str, Metric]]) -> dict[str, float]:
    """Metrics of all batches as of one, under names that begin with eval/."""
    sums: dict[str, Metric] = {}
    for new in found:
        sums = {k: merge(sums[k], new[k]) if sums else new[k] for k in new}
    values = fetch({k: finalize(v) for k, v in sums.items()})
    return {f"eval/{k}": float(v) for k, v in values.items()}
