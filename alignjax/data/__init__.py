"""Files of records -> token rows and prompts on the host, with a position. Imports no jax."""

from alignjax.data.branches import sequence_ids, share_prompts, shared_row_len
from alignjax.data.comparison_rows import branch_segments, comparison_rows, most_in_row
from alignjax.data.comparisons import Comparison, View, all_responses, pairs, rankings, unpaired
from alignjax.data.elements import Element, comparison_encoder
from alignjax.data.encode import (
    TextConfig,
    TextOptions,
    prompt_encoder,
    sequence_encoder,
    training_source,
)
from alignjax.data.layouts import LAYOUTS, open_preferences, write_preferences
from alignjax.data.packing import pack
from alignjax.data.pipeline import Prompt, RecordIterator, examples, token_rows
from alignjax.data.preferences import Preference, Preferences
from alignjax.data.schema import Example, Examples, Fields
from alignjax.data.sources import Source, open_source
from alignjax.data.texts import texts
from alignjax.data.turns import Turns

__all__ = [
    "LAYOUTS",
    "Comparison",
    "Element",
    "Example",
    "Examples",
    "Fields",
    "Preference",
    "Preferences",
    "Prompt",
    "RecordIterator",
    "Source",
    "TextConfig",
    "TextOptions",
    "Turns",
    "View",
    "all_responses",
    "branch_segments",
    "comparison_encoder",
    "comparison_rows",
    "examples",
    "most_in_row",
    "open_preferences",
    "open_source",
    "pack",
    "pairs",
    "prompt_encoder",
    "rankings",
    "sequence_encoder",
    "sequence_ids",
    "share_prompts",
    "shared_row_len",
    "texts",
    "token_rows",
    "training_source",
    "unpaired",
    "write_preferences",
]
