"""One decoder: its configuration, its pure functions, Hugging Face directories in and out."""

from alignjax.models.config import ModelConfig
from alignjax.models.heads import ScalarModel
from alignjax.models.hf import (
    load,
    load_eos_ids,
    load_reward,
    load_value_head,
    save,
    save_reward,
    save_value_head,
)
from alignjax.models.transformer import Model

__all__ = [
    "Model",
    "ModelConfig",
    "ScalarModel",
    "load",
    "load_eos_ids",
    "load_reward",
    "load_value_head",
    "save",
    "save_reward",
    "save_value_head",
]
