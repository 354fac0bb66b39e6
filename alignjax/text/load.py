"""The directory of a model -> its tokenizer, from whichever file is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from alignjax.core.errors import UserError
from alignjax.core.hub import TOKENIZER_FILES, resolve
from alignjax.text.sentencepiece import SENTENCEPIECE_FILE, load_sentencepiece
from alignjax.text.tiktoken import is_tiktoken, load_tiktoken
from alignjax.text.tokenizer import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE, HFTokenizer


def load_tokenizer(path: str | Path) -> HFTokenizer:
    """Reads the tokenizer of a directory, or of an id of the Hub.

    The first of these that is there: tokenizer.json; tokenizer.model, of sentencepiece or, as with
    Llama 3's own, of tiktoken; the only *.tiktoken. tokenizer_config.json and chat_template.jinja
    beside it say which tokens are special and how a conversation is written; a sentencepiece model
    needs neither.

    Raises:
      UserError: if there is none, or it cannot be read.
    """
    folder = resolve(path, TOKENIZER_FILES)
    if not folder.is_dir():
        raise UserError(f"tokenizer: no such directory: {folder}")
    config = _config(folder)
    if (folder / TOKENIZER_FILE).is_file():
        return _load_json(folder / TOKENIZER_FILE, config)
    model, ranks = folder / SENTENCEPIECE_FILE, sorted(folder.glob("*.tiktoken"))
    if model.is_file():
        return (load_tiktoken if is_tiktoken(model) else load_sentencepiece)(model, config)
    if len(ranks) == 1:
        return load_tiktoken(ranks[0], config)
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise UserError(
        f"{folder}: no tokenizer; expected {TOKENIZER_FILE} with {CONFIG_FILE}, "
        f"{SENTENCEPIECE_FILE} or one *.tiktoken (found {found})"
    )


def _load_json(path: Path, config: dict[str, Any]) -> HFTokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing more specific.
        raise UserError(f"{path}: not a tokenizer that can be read: {error}") from error
    if not (path.parent / CONFIG_FILE).is_file():
        raise UserError(
            f"{path.parent}: {TOKENIZER_FILE} without {CONFIG_FILE}, which names its EOS"
        )
    return HFTokenizer(tokenizer, config, str(path))


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template of its own file; {} where there is neither."""
    config = {}
    path = folder / CONFIG_FILE
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: broken JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{path}: expected an object, came {type(config).__name__}")
    if (folder / TEMPLATE_FILE).is_file():  # Newer than, and preferred to, the one in the config.
        config["chat_template"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return config
