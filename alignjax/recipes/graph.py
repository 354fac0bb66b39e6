"""A recipe -> its stages, one after the other; each hands a directory on to those that follow.

`${STAGE}` in a value of a later stage is the directory of an earlier one, so that a recipe passes
artifacts, never live objects; `${NAME}` is also what stands at NAME in `vars`. A finished stage is
skipped on a re-run.
"""

import contextlib
import importlib
import inspect
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

from alignjax.core.config import Config, DirectoryName, check_name
from alignjax.core.errors import KeyedError, UserError
from alignjax.core.processes import is_first, together, wait_for_all
from alignjax.core.yaml_tree import Key
from alignjax.data import open_source, texts
from alignjax.evals.run import EvalConfig, Report, evaluate, write_report
from alignjax.phases.common import PhaseConfig
from alignjax.phases.registry import DATA_PHASES, PHASES
from alignjax.phases.scoring import Rewards
from alignjax.recipes.stage import check_same, claim, lock, run_data_phase, run_phase
from alignjax.text import train_sentencepiece
from alignjax.train.progress import Progress


class FilesConfig(Config):
    """`phase: files`: a function of the library, or your own, writes files into the directory."""

    phase: Literal["files"]
    name: str
    output_dir: str
    seed: int = Field(0, ge=0)
    function: str
    """package.module.function, called as function(directory, seed=seed, **args)."""
    args: dict[str, Any] = {}


class TokenizerConfig(Config):
    """`phase: tokenizer`: a sentencepiece vocabulary, trained on fields of records."""

    phase: Literal["tokenizer"]
    name: str
    output_dir: str
    seed: int = Field(0, ge=0)
    sources: str | list[str]
    fields: list[str] = Field(min_length=1)
    vocab_size: int = Field(ge=1)
    special_tokens: list[str] = []


class EvalStageConfig(EvalConfig):
    """`phase: eval`: a model is measured, as `alignjax eval` does it."""

    phase: Literal["eval"]
    name: str
    output_dir: str


_CONFIGS = [config for config, _ in (*DATA_PHASES.values(), *PHASES.values())]
Stage = Annotated[
    Union[(FilesConfig, TokenizerConfig, EvalStageConfig, *_CONFIGS)],
    Field(discriminator="phase"),
]


class RecipeConfig(Config):
    """Stages by name, in order. `seed` is the default of their seeds.

    What differs from one machine to the next, such as where the data are, stands once in `vars`, as
    `NAME: text`, and is `${NAME}` in the stages; on the command line it is `vars.NAME=...`.
    """

    name: DirectoryName
    output_dir: str = "runs"
    seed: int = Field(0, ge=0)
    vars: dict[str, str] = {}
    stages: dict[str, Stage] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _place_stages(cls, values: Any) -> Any:
        """Gives each stage its name, directory and seed, and resolves `${NAME}`."""
        if not isinstance(values, dict) or not isinstance(values.get("stages"), dict):
            return values
        root = f"{values.get('output_dir', 'runs')}/{values.get('name', '')}"
        variables = values.get("vars")
        # One that is no text is a fault of its own, told by its type.
        known = {k: str(v) for k, v in variables.items()} if isinstance(variables, dict) else {}
        stages = {}
        for name, stage in values["stages"].items():
            try:
                check_name(name)
            except ValueError as fault:
                raise KeyedError(("stages", name), str(fault)) from None
            if name in known:
                raise KeyedError(("stages", name), "there is a variable of that name in vars")
            if isinstance(stage, dict):
                fixed = {"name": name, "output_dir": root}
                for key in fixed.keys() & stage.keys():
                    raise KeyedError(
                        ("stages", name, key), "a recipe places its stages itself; leave it out"
                    )
                stage = _resolve(stage, known, ("stages", name))
                stages[name] = {"seed": values.get("seed", 0)} | stage | fixed
            else:
                stages[name] = stage
            known[name] = f"{root}/{name}"
        return values | {"stages": stages}


def run_recipe(config: RecipeConfig, *, command: str) -> Path:
    """Runs what is not finished yet; returns the directory of the recipe."""
    for stage in config.stages.values():
        if isinstance(stage, FilesConfig):
            _find(stage)  # A wrong name is found now, not after the hours of an earlier stage.
    for name, stage in config.stages.items():
        if isinstance(stage, FilesConfig | TokenizerConfig | EvalStageConfig):
            _run_files(stage)
        elif isinstance(stage, PhaseConfig):
            run_phase(stage, command=command, title=name)
        else:
            run_data_phase(stage, command=command, title=name)
    return Path(config.output_dir) / config.name


def _run_files(stage: FilesConfig | TokenizerConfig | EvalStageConfig) -> None:
    """Makes the directory of a stage that writes files; it appears whole or not at all."""
    run_dir = Path(stage.output_dir) / stage.name
    progress = Progress(title=stage.name)
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                stack.enter_context(lock(run_dir, run_dir.with_name(f".{run_dir.name}.lock")))
                if run_dir.exists():
                    check_same(run_dir, stage)
        is_done = run_dir.exists()
        wait_for_all("looked for a finished stage")  # Before the first may write it.
        if is_done:
            progress.note(f"{run_dir} is there already: nothing to do")
            return
        with together():
            found = evaluate(stage, Rewards) if isinstance(stage, EvalStageConfig) else None
        with together():
            if is_first():
                _write_directory(stage, run_dir, found, progress)


def _write_directory(
    stage: FilesConfig | TokenizerConfig | EvalStageConfig,
    run_dir: Path,
    found: Report | None,
    progress: Progress,
) -> None:
    temporary = run_dir.with_name(f".{run_dir.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        if found is None:
            _write_files(stage, temporary)
        else:
            for line in found.lines():
                progress.note(line)
            write_report(found, temporary)
        claim(temporary, stage)
        temporary.rename(run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    progress.note(f"wrote {run_dir}")


def _write_files(stage: FilesConfig | TokenizerConfig, directory: Path) -> None:
    if isinstance(stage, TokenizerConfig):
        records = texts(open_source(stage.sources), stage.fields)
        train_sentencepiece(
            records, directory, stage.vocab_size, special_tokens=stage.special_tokens
        )
        return
    function = _find(stage)
    try:
        function(directory, seed=stage.seed, **stage.args)
    except UserError:
        raise
    except Exception as error:  # Whatever a function of the user's may raise.
        raise UserError(
            f"stages.{stage.name}: {stage.function} raised {type(error).__name__}: {error} "
            "(--debug shows where)"
        ) from error


def _find(stage: FilesConfig) -> Callable[..., None]:
    """The function of a stage. Raises UserError if there is none, or it does not take the args."""
    where = f"stages.{stage.name}"
    module, _, name = stage.function.rpartition(".")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # Last, as for reward functions.
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{where}.function: expected package.module.function, got {stage.function!r}: {error}"
        ) from error
    try:
        inspect.signature(function).bind(Path(), seed=stage.seed, **stage.args)
    except TypeError as error:
        raise UserError(f"{where}.args: {stage.function}: {error}") from error
    return function


def _resolve(value: Any, known: Mapping[str, str], key: Key) -> Any:
    """Replaces `${NAME}` by a variable or the directory of an earlier stage, below `value`."""
    match value:
        case dict():
            return {k: _resolve(v, known, (*key, k)) for k, v in value.items()}
        case list():
            return [_resolve(v, known, (*key, i)) for i, v in enumerate(value)]
        case str():

            def directory(found: re.Match[str]) -> str:
                if found[1] not in known:
                    raise KeyedError(
                        key,
                        f"${{{found[1]}}} is no earlier stage; there are "
                        f"{', '.join(known) or 'none'}",
                    )
                return known[found[1]]

            return re.sub(r"\$\{([^{}]*)\}", directory, value)
    return value
