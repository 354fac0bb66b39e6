"""What phases that train on preferences share: their data in rows, and what a model is given."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np
from jax.sharding import Mesh
from pydantic import Field, model_validator

from alignjax.core.config import Config
from alignjax.data import (
    LAYOUTS,
    Element,
    Preferences,
    RecordIterator,
    Source,
    TextOptions,
    branch_segments,
    comparison_encoder,
    comparison_rows,
    open_preferences,
)
from alignjax.phases.common import checked_rows
from alignjax.text import HFTokenizer
from alignjax.train.step import Batch


class ComparisonData(Config):
    """Preferences, and how they become rows."""

    train: str | list[str]
    """A .jsonl, .parquet or .array_record file, a saved data set, tfds:NAME/SPLIT or hf:NAME/SPLIT;
    several, of one layout, follow each other."""
    eval: str | list[str] | None = None
    """Held-out records, of the same form."""
    layout: Literal["auto", *LAYOUTS] = "auto"
    """How records are written down; auto goes by the keys of the first one."""
    annotators: list[str] | None = None
    """Ids of those who may have judged: a record of anybody else is wrong (`faulty`). null:
    anybody."""
    faulty: Literal["error", "drop"] = "error"
    """What to do with a record that is wrong, such as two equal responses."""
    text: TextOptions = TextOptions()
    row_len: int = Field(1024, ge=2)
    """Tokens in a row. A prompt with all its responses stands in one row."""
    num_prompts: int = Field(32, ge=1)
    """Comparisons in an update: prompts with their responses, or pairs."""
    micro_batches: int = Field(1, ge=1)
    """Micro-batches in an update; packed rows that fill fewer save the time of the others."""
    packed: bool = True
    """Lay several comparisons into a row; they do not see each other."""
    shared_prompt: bool = True
    """Compute the prompt once for all its responses; false: once for each, as elsewhere."""
    overlong: Literal["error", "drop"] = "drop"
    """What to do with a comparison longer than a row, or a response that ends beyond the model's
    context. It is never cut."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.num_prompts % self.micro_batches:
            raise ValueError(
                f"num_prompts={self.num_prompts} comparisons do not divide into "
                f"{self.micro_batches} micro-batches"
            )
        return self

    def open(self, spec: str | list[str]) -> Preferences:
        """Checked preferences; see `open_preferences`."""
        return open_preferences(spec, self.layout, annotators=self.annotators, faulty=self.faulty)


def batches(
    data: ComparisonData,
    view: Source,
    tokenizer: HFTokenizer,
    mesh: Mesh,
    *,
    context: int,
    num_responses: int,
    seed: int,
    encode: Callable[[Any], Element] | None = None,
    **order: Any,
) -> RecordIterator[dict[str, np.ndarray]]:
    """This process's share of the rows of a view; see `comparison_rows`, also for `order`.

    Args:
      context: tokens that the model takes at most (max_position_embeddings).
      num_responses: K.
      encode: comparison -> its ids; None: `comparison_encoder`.
    Raises:
      UserError: if the rows of a micro-batch do not divide over the devices.
    """
    rows = checked_rows(data.num_prompts // data.micro_batches, mesh)
    return comparison_rows(
        view,
        comparison_encoder(data.text, tokenizer) if encode is None else encode,
        num_prompts=rows * data.micro_batches,
        num_micro_batches=data.micro_batches,
        row_len=data.row_len,
        num_responses=num_responses,
        shared_prompt=data.shared_prompt,
        max_len=context,
        packed=data.packed,
        overlong=data.overlong,
        seed=seed,
        **order,
    )


def token_rows_of(
    batch: Mapping[str, Any], num_responses: int, *, shared_prompt: bool
) -> dict[str, Any]:
    """The rows as a model takes them: `tokens`, `mask`, `positions`, `segment_ids` and, with
    shared prompts, `branches`. Without, each completion is a segment of its own."""
    rows = {name: batch[name] for name in ("tokens", "mask", "positions")}
    if shared_prompt:
        return rows | {"segment_ids": batch["segment_ids"], "branches": batch["branches"]}
    return rows | {"segment_ids": branch_segments(batch, num_responses)}


def per_element(values: Any, batch: Batch) -> Any:
    """[R, N K], one entry for each completion -> [R, N, K]; `ranks` says which there are."""
    return values.reshape(batch["ranks"].shape)
