"""Files of records -> token rows and prompts on the host, with a position. Imports no jax."""

from alignjax.data.encode import TextConfig, prompt_encoder, sequence_encoder, training_source
from alignjax.data.packing import pack
from alignjax.data.pipeline import Prompt, RecordIterator, examples, token_rows
from alignjax.data.schema import Example, Examples, Fields
from alignjax.data.sources import Source, open_source
from alignjax.data.texts import texts
from alignjax.data.turns import Turns

__all__ = [
    "Example",
    "Examples",
    "Fields",
    "Prompt",
    "RecordIterator",
    "Source",
    "TextConfig",
    "Turns",
    "examples",
    "open_source",
    "pack",
    "prompt_encoder",
    "sequence_encoder",
    "texts",
    "token_rows",
    "training_source",
]
