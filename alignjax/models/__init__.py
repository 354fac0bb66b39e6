"""One decoder: its configuration, its pure functions, Hugging Face directories in and out."""

from alignjax.models.config import ModelConfig
from alignjax.models.hf import load, load_eos_ids, save
from alignjax.models.transformer import Model

__all__ = ["Model", "ModelConfig", "load", "load_eos_ids", "save"]
