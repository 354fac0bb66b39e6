"""A dotted path -> a reward function; what it returned -> named numbers.

A reward function is any `def reward(prompt, completion, reference, **fields) -> float | dict`. It
is called by keyword and gets what it names: `prompt`, `completion`, `reference`, `num_tokens`,
`is_truncated` and the fields of the record. These are JSON values: of Parquet's others dates and
times are ISO text, decimals and UUIDs text, and bytes text where they are UTF-8 and None elsewhere.

Keyword-only parameters with a default are its options: only the config's `args` set them, so that a
column of the data cannot change how it works.

This module and what it imports are loaded by every worker: standard library only.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from alignjax.core.errors import UserError
from alignjax.rewards.answers import find_answer

BUILTIN_MODULES = ("verify", "format")
_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
}
"""Annotations of the built-ins' options: what may stand there."""
RewardFunction = Callable[..., Any]


def load(path: str) -> RewardFunction:
    """Finds a reward function.

    Args:
      path: a built-in (`verify.exact`), `package.module:function`, `package.module.function` or
        `path/to/file.py:function`. Modules are also looked for in the current directory, last.
    Raises:
      UserError: if there is none; it says what was looked for and what the module has.
    """
    module_name, colon, name = path.rpartition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise UserError(
            f"reward function {path!r}: expected a built-in such as verify.exact, "
            "package.module:function or path/to/file.py:function"
        )
    if not colon and module_name in BUILTIN_MODULES:
        module_name = f"alignjax.rewards.{module_name}"
    try:
        module = _import(module_name, path)
    except UserError:
        raise
    except BaseException as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"reward function {path!r}: importing {module_name} failed: {describe(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        has = _functions_of(module)
        close = difflib.get_close_matches(name, has, 1)
        raise UserError(
            f"reward function {path!r}: {module_name} has no function {name!r}; it has "
            + (", ".join(has) or "none")
            + (f". Did you mean {close[0]!r}?" if close else "")
        )
    return function


def _import(module_name: str, path: str) -> ModuleType:
    if module_name.endswith(".py"):
        file = Path(module_name).resolve()
        if not file.is_file():
            raise UserError(f"reward function {path!r}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        if module_name.startswith("alignjax.rewards."):
            module_name = f"{module_name}; built-ins are in {' and '.join(BUILTIN_MODULES)}"
        raise UserError(
            f"reward function {path!r}: there is no module {error.name!r}, looked for as "
            f"{module_name} in the installed packages and in {here}"
        ) from error


def _functions_of(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]
    return sorted(names)


def bind(function: RewardFunction, args: Mapping[str, Any], path: str) -> Callable[..., Any]:
    """Fixes the options of a reward function.

    Args:
      function: what `load` found.
      args: options by name.
      path: what to call it in errors.
    Returns:
      call(values): the function of the values that it names.
    Raises:
      UserError: on an option that it does not have, and, of a built-in, on one that is missing or
        has a value that it cannot be.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have none
        return lambda values: function(**{**values, **args})
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in by_keyword]
    is_builtin = str(getattr(function, "__module__", "")).startswith("alignjax.rewards.")
    keyword_only = [p for p in by_keyword if p.kind == p.KEYWORD_ONLY]
    options = {p.name for p in keyword_only if is_builtin or p.default is not p.empty}
    for arg in args:
        # A built-in swallows `**fields`; a misspelt option must not vanish in there.
        if arg not in names and (not takes_any or options):
            close = difflib.get_close_matches(arg, names, 1)
            raise UserError(
                f"reward function {path!r} has no argument {arg!r}; it has {', '.join(names)}"
                + (f". Did you mean {close[0]!r}?" if close else "")
            )

    for option in keyword_only if is_builtin else []:
        if option.name in args:
            fault = _fault(option, args[option.name])
        else:
            fault = "it is missing; set it in args" if option.default is option.empty else None
        if fault:
            raise UserError(f"reward function {path!r}, argument {option.name!r}: {fault}")

    def call(values: Mapping[str, Any]) -> Any:
        seen = {k: v for k, v in values.items() if (takes_any or k in names) and k not in options}
        return function(**{**seen, **args})

    return call


def _fault(option: inspect.Parameter, value: Any) -> str | None:
    """What is wrong with the value of a built-in's option, if anything."""
    if option.annotation == "Sequence[str]":
        is_right, expected = isinstance(value, list), "a list of texts"
        is_right = is_right and all(isinstance(item, str) for item in value)
    else:
        kinds, expected = _KINDS[option.annotation]
        is_right = isinstance(value, kinds)
    if not is_right:
        return f"expected {expected}, came {value!r}"
    try:
        if option.name == "pattern":
            re.compile(value)
        elif option.name in ("place", "reference_place"):
            find_answer("", value)
    except (ValueError, re.error) as error:
        return f"{value!r}: {error}"
    return None


def named_parts(result: Any) -> dict[str, float]:
    """What a reward function returned -> its reward under "", and its parts by name.

    A number is the reward. Of a dict of numbers the reward is the value at "reward", the others
    being for the metrics only; without that key it is their sum.

    Raises:
      TypeError: on any other type, None included.
      ValueError: on NaN, an infinity or an empty dict.
    """
    if not isinstance(result, Mapping):
        return {"": _number(result)}
    if not result:
        raise ValueError("it returned an empty dict")
    parts = {str(key): _number(value, f" at {key!r}") for key, value in result.items()}
    total = parts.pop("reward") if "reward" in parts else math.fsum(parts.values())
    return {"": total, **parts}


def _number(value: Any, where: str = "") -> float:
    if not isinstance(value, (bool, int, float)) and getattr(value, "shape", None) == ():
        value = value.item()  # a NumPy, JAX or torch scalar
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"it returned {type(value).__name__}{where}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"it returned {number}{where}; expected a finite number")
    return number


def describe(error: BaseException, limit: int = 300) -> str:
    """`TypeError: text (line 3 of rewards.py)`, on one line, cut to `limit` characters."""
    text = " ".join(traceback.format_exception_only(error)[-1].split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return text[: limit - 3] + "..." * (len(text) > limit - 3) + where
