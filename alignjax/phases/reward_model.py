"""A trunk from a directory or from nothing, and a head -> a reward model to train and to export."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.processes import is_first
from alignjax.core.types import Params
from alignjax.data import branch_segments
from alignjax.models import ScalarModel, lora, save_reward
from alignjax.models.heads import last_values
from alignjax.phases.common import PhaseConfig, Policy, appearing
from alignjax.phases.comparisons import per_element, token_rows_of
from alignjax.sharding import shardings
from alignjax.train.step import Batch


class Trunk(Policy):
    """A policy without its unembedding, which a reward model does not use."""

    def __init__(self, config: PhaseConfig, mesh: Mesh):
        super().__init__(config, mesh)
        tied = self.model.config.model_copy(update={"tie_embeddings": True})
        self.model = dataclasses.replace(self.model, config=tied)
        if self.frozen is not None:
            self.frozen = _without_unembedding(self.frozen)

    def init(self, key: Array) -> Params:
        return _without_unembedding(super().init(key))


class RewardModel:
    """What is trained: `params` is {"decoder": ..., "head": {"kernel": [D]}}; under LoRA the
    decoder holds the adapters alone.

    Attributes:
      model: `ScalarModel`, with the adapters if there are any.
      frozen: under LoRA {"decoder": the base}; else None.
      tokenizer, eos_ids: as of `Policy`.
    """

    def __init__(self, config: PhaseConfig, mesh: Mesh):
        self._trunk, self._mesh = Trunk(config, mesh), mesh
        self.model = ScalarModel(self._trunk.model)
        base = self._trunk.frozen
        self.frozen: Params | None = None if base is None else {"decoder": base}
        self.tokenizer, self.eos_ids = self._trunk.tokenizer, self._trunk.eos_ids

    def init(self, key: Array) -> dict[str, Any]:
        """The trunk's weights, and a new head."""
        size = self.model.decoder.config.hidden_size
        make = functools.partial(self.model.new_head, hidden_size=size)
        place = shardings(self.model.logical_axes()["head"], self._mesh, jax.eval_shape(make, key))
        head = jax.jit(make, out_shardings=place)(named_key(key, "head"))
        return {"decoder": self._trunk.init(key), "head": head}

    @property
    def pad_id(self) -> int:
        """What pads rows in transformers: not what ends a response, if there is another token.

        It scores the last token that is no padding, which must be the stop token. BOS ends nothing.
        """
        pad, bos = self.tokenizer.pad_id, self.tokenizer.bos_id
        if pad in self.eos_ids and bos is not None and bos not in self.eos_ids:
            return bos
        return pad

    def whole(self, params: Params) -> Params:
        """The parameters that the model computes with, those that do not train included."""
        return params if self.frozen is None else lora.combine(self.frozen, params)

    def export(
        self, params: Params, path: Path, texts: Mapping[str, str] = {}, **files: Any
    ) -> None:
        """Writes an AutoModelForSequenceClassification with the tokenizer, whole or not at all.

        Adapters are merged into the weights.

        Args:
          texts: name -> content of further files.
          files: `dtype` and `max_shard_bytes`, as of `models.save_reward`.
        """
        model = ScalarModel(lora.plain(self.model.decoder))
        merged = {"decoder": self._trunk.merged(params["decoder"]), "head": params["head"]}
        ids = self._trunk.token_ids | {"pad_token_id": self.pad_id}
        with appearing(path) as temporary:
            save_reward(temporary, model, merged, extra_config=ids, **files)
            if is_first():
                self.tokenizer.save(str(temporary))
                for name, text in texts.items():
                    (temporary / name).write_text(text, encoding="utf-8")

    def export_adapter(self, params: Params, path: Path) -> None:
        """PEFT has no place for our head. Raises UserError."""
        raise UserError(
            "the adapters of a reward model are not written by themselves, since its head is new: "
            "export the model, without --adapter"
        )


def score_elements(
    model: ScalarModel, params: Params, batch: Batch, *, shared_prompt: bool
) -> Array:
    """Rows of comparisons (`data.comparison_rows`) -> the score of each completion.

    Returns:
      [R, N, K] float32, reward units, at the last token of the completion, its stop token; 0 where
      there is no completion, which `ranks` tells.
    """
    *_, most, num_responses = batch["ranks"].shape
    rows = token_rows_of(batch, num_responses, shared_prompt=shared_prompt)
    del rows["mask"]
    values = model.apply(params, **rows)
    segments = branch_segments(batch, num_responses)
    scores, _ = last_values(values, segments, most * num_responses)
    return per_element(scores, batch)


def _without_unembedding(params: Params) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != "unembedding"}
