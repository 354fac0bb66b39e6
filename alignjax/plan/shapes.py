"""Paths of models in a config -> their shapes, without weights, and offline where that can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError
from alignjax.core.hub import resolve
from alignjax.models import ModelConfig
from alignjax.models.classify import reward_from_hf
from alignjax.models.hf import CONFIG
from alignjax.models.hf_config import from_hf
from alignjax.models.stored import read_json
from alignjax.phases.common import ModelSource, PhaseConfig
from alignjax.text import load_tokenizer


class Shapes:
    """What is known of models: of directories that are here, of those that earlier stages of a
    recipe will write, of config.json files that were given or that ship with the library."""

    def __init__(self, given: Mapping[str, Path] | None = None):
        """Args: given: path of a model -> the config.json to take for it."""
        self._models: dict[str, ModelConfig] = {}
        self._stages: dict[str, PhaseConfig] = {}
        self._vocab_sizes: dict[str, int] = {}
        for path, file in (given or {}).items():
            self._models[path] = _read(file)

    def add_stage(self, path: str, config: PhaseConfig) -> None:
        """The directory of a model, with a tokenizer, that a phase is going to write."""
        self._stages[path] = config

    def add_tokenizer(self, path: str, vocab_size: int) -> None:
        """A directory with a tokenizer that a stage is going to write."""
        self._vocab_sizes[path] = vocab_size

    def of(self, path: str) -> ModelConfig:
        """The shape of the model at a path, or of the trunk of a reward model.

        Raises:
          UserError: if nothing says what it is; and as `models.load` does.
        """
        if path not in self._models and path in self._stages:
            writer = self._stages[path]
            self._models[path] = self.of_source(writer.model, writer)
        elif path not in self._models:
            here = Path(path).expanduser()
            shipped = _shipped(path)
            file = here / CONFIG
            if not here.exists() and shipped is not None:
                file = shipped
            elif not here.exists():
                try:
                    file = resolve(path, [CONFIG]) / CONFIG
                except UserError as error:
                    raise UserError(f"{error}\n{_remedy(path)}") from error
            if not file.is_file():
                raise UserError(f"{file}: no such file; {_remedy(path)}")
            self._models[path] = _read(file)
        return self._models[path]

    def of_source(self, source: ModelSource, config: PhaseConfig) -> ModelConfig:
        """The shape of what a phase trains."""
        if source.path is not None:
            return self.of(source.path)
        assert source.init is not None
        values: dict[str, Any] = source.init.model_dump(exclude_none=True)
        if "vocab_size" not in values:
            values["vocab_size"] = self._vocab_size(config.tokenizer_source())
        return ModelConfig(**values)

    def _vocab_size(self, where: str) -> int:
        if where in self._stages:
            return self.of(where).vocab_size
        if where not in self._vocab_sizes:
            try:
                self._vocab_sizes[where] = load_tokenizer(where).vocab_size
            except UserError as error:
                raise UserError(
                    f"{error}\nto plan without the tokenizer, say how many tokens it has: "
                    "model.init.vocab_size=N (in a recipe: stages.NAME.model.init.vocab_size=N)"
                ) from error
        return self._vocab_sizes[where]


def _read(file: Path) -> ModelConfig:
    data = read_json(file)
    is_classifier = str(data.get("architectures")).endswith("ForSequenceClassification']")
    return (reward_from_hf if is_classifier else from_hf)(str(file), data)


def _shipped(name: str) -> Path | None:
    """The config.json of a model of the Hub that ships with the library."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        file = folder / "models" / name / CONFIG
        if not Path(name).is_absolute() and ".." not in Path(name).parts and file.is_file():
            return file
    return None


def _remedy(path: str) -> str:
    return (
        f"a plan needs no weights, only the shape of {path}: give its config.json with "
        f"--model-config {path}=FILE"
    )
