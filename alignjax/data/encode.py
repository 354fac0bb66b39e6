"""`Example` -> a token sequence to train on, or the ids of a prompt to go on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.data.schema import Example, Examples, Fields
from alignjax.data.sources import open_source
from alignjax.data.turns import Turns
from alignjax.text.chat import (
    ChatTemplate,
    encode_chat,
    encode_chat_prompt,
    encode_prompt,
    encode_prompt_completion,
)


class TextOptions(Config):
    """How text becomes token ids."""

    chat: bool = False
    """Wrap prompt and completion into the model's chat template as user and assistant messages.
    Records with `messages` always go through the template."""
    system: str | None = None
    """Content of a system message to put first, with chat."""
    chat_template: str | None = None
    """A jinja file, instead of the template that comes with the tokenizer."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Further variables for the template, such as enable_thinking."""
    add_bos: bool = True
    """Begin plain text with the BOS token, where the tokenizer has one. Never twice."""
    add_eos: bool = True
    """End the completion of plain text with EOS, and train it."""


class TextConfig(TextOptions):
    """How a record becomes text, and text becomes token ids."""

    fields: Fields
    train_on: Literal["all", "last", "each"] = "all"
    """Which assistant messages of a conversation are targets: all at once; the last; or each in a
    sequence of its own, which ends there: for templates that rewrite earlier turns (Qwen3)."""


def training_source(path: str | Sequence[str], config: TextConfig) -> Examples | Turns:
    """Checked examples of what is at `path` (see `open_source`), one for each sequence to train."""
    examples = Examples(open_source(path), config.fields)
    return Turns(examples) if config.train_on == "each" else examples


def sequence_encoder(
    config: TextConfig, tokenizer: Tokenizer
) -> Callable[[Example], dict[str, np.ndarray]]:
    """A function from an example to `tokens` ([length] int32) and `mask` (bool), for SFT.

    With `train_on="each"` the examples have to be those of `training_source`.
    """
    template = _template_of(config, tokenizer)
    train_on: Literal["all", "last"] = "all" if config.train_on == "all" else "last"

    def ids_and_mask(example: Example) -> tuple[list[int], list[bool]]:
        if example.messages is None and example.completion is None:
            raise UserError(
                "no completion to train on; name its key in fields.completion, or set messages"
            )
        if template is None:
            return encode_prompt_completion(
                tokenizer, example.prompt or "", example.completion or "",
                add_bos=config.add_bos, add_eos=config.add_eos,
            )  # fmt: skip
        messages = example.messages or [
            *_opening(config, example), {"role": "assistant", "content": example.completion},
        ]  # fmt: skip
        return encode_chat(
            tokenizer, template, messages, train_on=train_on, **_variables(config, example)
        )

    def encode(example: Example) -> dict[str, np.ndarray]:
        ids, mask = ids_and_mask(example)
        return {"tokens": np.array(ids, np.int32), "mask": np.array(mask, bool)}

    return encode


def prompt_encoder(config: TextConfig, tokenizer: Tokenizer) -> Callable[[Example], np.ndarray]:
    """A function from an example to the ids that generation starts from ([length] int32)."""
    template = _template_of(config, tokenizer)

    def encode(example: Example) -> np.ndarray:
        if example.messages is None and example.prompt is None:
            raise UserError(
                "no prompt to go on from; name its key in fields.prompt, or set messages"
            )
        if template is None:
            ids = encode_prompt(tokenizer, example.prompt or "", add_bos=config.add_bos)
        else:
            messages = example.messages or _opening(config, example)
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            ids = encode_chat_prompt(tokenizer, template, messages, **_variables(config, example))
        return np.array(ids, np.int32)

    return encode


def _variables(config: TextConfig, example: Example) -> dict[str, Any]:
    tools = {} if example.tools is None else {"tools": example.tools}
    return config.template_variables | tools


def _opening(config: TextConfig, example: Example) -> list[dict[str, Any]]:
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    return [*system, {"role": "user", "content": example.prompt or ""}]


def _template_of(config: TextConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    is_chat = config.chat or config.fields.messages is not None
    return chat_template(config, tokenizer) if is_chat else None


def chat_template(config: TextOptions, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a file, if the config names one, or of the tokenizer."""
    if config.chat_template is None:
        return ChatTemplate(tokenizer)
    path = Path(config.chat_template)
    if not path.is_file():
        raise UserError(f"chat_template: no such file: {path}")
    return ChatTemplate(tokenizer, path.read_text(encoding="utf-8"))
