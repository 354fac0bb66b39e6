"""YAML text and `key=value` overrides -> checked, frozen configs, each value with its origin.

tree = load("configs/smoke/sft.yaml", ["optimizer.learning_rate=1e-4"])
config = build(SftConfig, tree)
print(describe(config, tree))
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from alignjax.core.complaints import complaints
from alignjax.core.errors import UserError
from alignjax.core.yaml_tree import Key, Tree, dotted, dump, load, loads, scalar_text

__all__ = [
    "Config", "DirectoryName", "Tree", "build", "check_name", "describe", "diff", "dump",
    "find_config", "load", "loads", "shipped_configs", "to_dict",
]  # fmt: skip


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, no silent coercion.

    Strict: an int is taken where a float is asked for, but never a string for a number, a float for
    an int or a number for a bool. A YAML list is taken for a tuple.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


def check_name(name: str) -> str:
    """The name of a directory below another one. Raises ValueError on anything else."""
    if name in ("", ".", "..") or any(char in name for char in "/\\\0"):
        raise ValueError(
            f"{name!r} names no directory of its own; leave out slashes and dots alone"
        )
    return name


DirectoryName = Annotated[str, AfterValidator(check_name)]

C = TypeVar("C", bound=BaseModel)


def build(schema: type[C], tree: Tree) -> C:
    """Checks a tree against a schema.

    Raises:
      UserError: one line for each thing that is wrong, with its place, in the order of the file.
    """
    try:
        # By way of JSON, in which a list is pydantic's strict input for a tuple.
        return schema.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        raise UserError("\n".join(complaints(schema, tree, error))) from None


def to_dict(config: BaseModel) -> dict[str, Any]:
    """The config as a JSON value, defaults included: what a run saves and `diff` compares."""
    return config.model_dump(mode="json", by_alias=True)


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed, a line each: "optimizer.learning_rate: 0.001 -> 0.002"."""
    before, after = (
        {k: _flow(v) for k, v in _leaves(values, ())} for values in (dict(old), dict(new))
    )
    return [
        f"{dotted(key)}: {before.get(key, '(not set)')} -> {after.get(key, '(not set)')}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def describe(config: BaseModel, tree: Tree) -> str:
    """Every value of a config as YAML, with a comment that says where it came from."""
    rows = list(_rows(to_dict(config), (), tree))
    width = min(48, max((len(text) for text, origin in rows if origin), default=0))
    return "".join(
        f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows
    )


def find_config(name: str | Path) -> Path:
    """A path, or the name of a config that ships with the library (`smoke/sft`) -> its file.

    Raises:
      UserError: there is none (names the closest ones that there are), or it is a directory.
    """
    path = Path(name)
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f", such as {inside}" if inside.is_file() else ""
        raise UserError(f"{name} is a directory; expected a YAML file{hint}")
    if path.exists():
        return path
    wanted, known = re.sub(r"^configs/|\.ya?ml$", "", path.as_posix()), shipped_configs()
    if wanted in known:
        return known[wanted]
    by_stem = [file for file in known.values() if file.stem == wanted]
    if len(by_stem) == 1:
        return by_stem[0]
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
    raise UserError(f"{name}: no such config file; {hint}")


def shipped_configs() -> dict[str, Path]:
    """The configs that ship with the library, by their names (`smoke/sft`)."""
    package = Path(__file__).resolve().parent.parent
    # An installed wheel holds them inside the package; a checkout beside it.
    folders = [f for f in (package / "configs", package.parent / "configs") if f.is_dir()]
    return {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in folders
        for file in sorted(folder.rglob("*.yaml"))
    }


def _is_flow(value: Any) -> bool:
    """True for what stands on one line: leaves, and lists and dicts that hold no dict."""
    if isinstance(value, dict):
        return not value
    return not isinstance(value, list) or not any(
        isinstance(item, dict) or not _is_flow(item) for item in value
    )


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    return "{}" if isinstance(value, dict) else scalar_text(value)


def _leaves(value: Any, key: Key) -> Iterator[tuple[Key, Any]]:
    if _is_flow(value):
        yield key, value
        return
    for part, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(item, (*key, part))


def _rows(values: dict[str, Any], key: Key, tree: Tree) -> Iterator[tuple[str, str]]:
    indent = "  " * len(key)
    for name, value in values.items():
        here = (*key, name)
        if _is_flow(value):
            yield f"{indent}{scalar_text(name)}: {_flow(value)}", _from(here, tree)
        elif isinstance(value, dict):
            yield f"{indent}{scalar_text(name)}:", ""
            yield from _rows(value, here, tree)
        else:
            yield f"{indent}{scalar_text(name)}:", ""
            for i, item in enumerate(value):
                if isinstance(item, dict):
                    first, *rest = _rows(item, (*here, i), tree)
                    yield f"{indent}  - {first[0].lstrip()}", first[1]
                    yield from rest
                else:
                    yield f"{indent}  - {_flow(item)}", _from((*here, i), tree)


def _from(key: Key, tree: Tree) -> str:
    """Where a value came from; a list may have come from several places."""
    places = [str(o) for k, o in tree.origins.items() if k[: len(key)] == key]
    return ", ".join(dict.fromkeys(places)) or "default"
