"""config.json of a reward model <-> config.json of the language model that is its trunk.

transformers has no reward models: one is a classifier of sequences with a single label, whose
score it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignjax.core.errors import UserError
from alignjax.models.config import ModelConfig
from alignjax.models.families import ROWS
from alignjax.models.hf_config import from_hf, to_hf

_IRREGULAR = {
    "GPT2LMHeadModel": "GPT2ForSequenceClassification",
    "Gemma3ForCausalLM": "Gemma3TextForSequenceClassification",
}


def _classifier(architecture: str) -> str:
    regular = architecture.replace("ForCausalLM", "ForSequenceClassification")
    return _IRREGULAR.get(architecture, regular)


_TRUNKS = {_classifier(row.architecture): row.architecture for row in ROWS.values()}


def reward_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config of a trunk -> the contents of the reward model's config.json."""
    data = to_hf(config)
    return data | {
        "architectures": [_classifier(data["architectures"][0])],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        # A trunk has no unembedding of its own.
        "tie_word_embeddings": True,
    }


def reward_from_hf(source: str, data: Mapping[str, Any]) -> ModelConfig:
    """The contents of a reward model's config.json -> the config of its trunk.

    Args:
      source: the file, for messages.
    Raises:
      UserError: if it is no classifier with one label of a family that is known here; and what
        `families.from_hf` raises.
    """
    architectures = data.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in _TRUNKS:
        raise UserError(
            f"{source}: architectures={architectures!r} is no reward model; expected one of "
            + ", ".join(_TRUNKS)
        )
    labels = data.get("id2label") or {}
    num_labels = len(labels) or data.get("num_labels", 2)  # 2: what transformers assumes
    if num_labels != 1:
        raise UserError(
            f"{source}: a classifier with {num_labels} labels; a reward model has one (id2label)"
        )
    trunk = {"architectures": [_TRUNKS[architectures[0]]], "tie_word_embeddings": True}
    return from_hf(source, {**data, **trunk})
