"""What a user calls a model -> a directory: one that is here, or a snapshot from the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from alignjax.core.errors import UserError

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
"""What is downloaded: data. Never *.bin, which is pickled, nor *.py: both can run code."""
_NOT = ("*/*", "consolidated*")
"""Folders and files that hold the same weights once more, in another layout."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def resolve(path_or_id: str | os.PathLike[str], files: Sequence[str] = MODEL_FILES) -> Path:
    """A directory as it is; the id of a model on the Hub (`Qwen/Qwen3-0.6B`) as its snapshot.

    What is here goes first, and OWNER/NAME is no id where there is a directory OWNER: then NAME is
    just missing in it. An id's files are downloaded by `huggingface_hub` unless they are in its
    cache; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they do there.

    Args:
      files: patterns of the names to download.
    Returns:
      The directory. One that is not there, if the name is no id: its reader says what it lacks.
    Raises:
      UserError: if an id is neither cached nor to be had, or huggingface_hub is not installed.
    """
    path, name = Path(path_or_id).expanduser(), os.fspath(path_or_id)
    if path.exists() or not _ID.fullmatch(name) or Path(name.split("/")[0]).exists():
        return path
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{name}: no such directory; to take it for a model of the Hugging Face Hub, install "
            "huggingface_hub (pip install 'alignjax[hf]')"
        ) from error
    try:
        snapshot = huggingface_hub.snapshot_download(
            name, allow_patterns=[*files], ignore_patterns=[*_NOT]
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name}: no such directory, and not to be had from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the name, the network and HF_HUB_OFFLINE, "
            "log in (hf auth login) if the model asks for it, or give the path of a directory"
        ) from error
    return Path(snapshot)
