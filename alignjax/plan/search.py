"""A config that does not fit -> one that would: layers computed twice, more micro-batches, other
meshes. Few are compiled: those first that cost least speed, and of each only what did not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from alignjax.core.config import Config, to_dict
from alignjax.core.errors import UserError
from alignjax.plan.chips import Chip
from alignjax.plan.measure import USABLE, measure
from alignjax.plan.memory import tree_bytes
from alignjax.plan.phases import programs_of
from alignjax.plan.programs import Program
from alignjax.plan.shapes import Shapes
from alignjax.sharding import MeshConfig

Change = dict[str, Any]
"""Dotted key of a config -> value."""
MICRO_BATCHES = (2, 4, 8, 16)
MESHES: tuple[dict[str, int], ...] = (
    {"data": 1, "fsdp": -1},
    {"data": 1, "fsdp": -1, "tensor": 2},
    {"data": 1, "fsdp": -1, "tensor": 4},
    {"data": 1, "fsdp": -1, "tensor": 8},
)


@dataclass(frozen=True)
class Remedy:
    """What was tried, and what would fit."""

    change: Change | None
    """None: nothing that was tried."""
    needed_bytes: float | None
    num_compiled: int

    def as_json(self) -> dict[str, Any]:
        return {
            "change": self.change,
            "needed_bytes": self.needed_bytes,
            "num_compiled": self.num_compiled,
        }

    @property
    def words(self) -> str:
        return " ".join(f"{key}={value}" for key, value in (self.change or {}).items()).lower()


def search(
    config: Config,
    devices: list[jax.Device],
    shapes: Shapes,
    chip: Chip,
    failed: set[str],
    say: Callable[[str], None],
    *,
    most: int = 8,
) -> Remedy:
    """Looks for changes with which the programs named in `failed` fit.

    A program that fitted is taken to fit still: each change takes memory from all of them.

    Args:
      most: compilations; the search ends with the candidate at work.
    """
    limit, num_compiled = USABLE * chip.hbm_bytes, 0
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    for change in candidates(to_dict(config), num_slices):
        if num_compiled >= most:
            break
        try:
            changed = with_changes(config, change)
            mesh, programs = programs_of(changed, devices, shapes)
        except (UserError, ValueError):
            continue  # Rows that do not divide over the devices, and the like.
        chosen = [program for program in programs.all if program.name in failed]
        if not chosen or any(_at_least(program) > limit for program in chosen):
            continue
        say(f"trying {Remedy(change, None, 0).words}")
        needed, is_whole = 0.0, True
        for program in chosen:
            found = measure(program, mesh, None)
            num_compiled += 1
            needed = max(needed, found.needed_bytes)
            is_whole &= found.memory is not None and found.needed_bytes <= limit
            if not is_whole:
                break
        say(f"  takes {needed / 2**30:.2f} GiB of {limit / 2**30:.2f}")
        if is_whole:
            return Remedy(change, needed, num_compiled)
    return Remedy(None, None, num_compiled)


def candidates(values: Mapping[str, Any], num_slices: int = 1) -> Iterator[Change]:
    """Changes in the order in which they are tried.

    First layers computed twice and smaller micro-batches, of the same updates; then fewer rows at
    once in the sampler; then both on meshes that spread parameters more.
    """
    own = list(_on_this_mesh(values))
    yield from own
    last = own[-1] if own else {}
    now = {axis: size for axis, size in values["mesh"].items() if size != 1}
    for mesh in MESHES:
        spread = {**mesh, "data": num_slices}
        if {axis: size for axis, size in spread.items() if size != 1} == now:
            continue
        keys = {f"mesh.{axis}": spread.get(axis, 1) for axis in MeshConfig.model_fields}
        where = {key: size for key, size in keys.items() if size != values["mesh"][key[5:]]}
        for change in ({}, *own[:1], *([last] if len(own) > 1 else [])):
            yield where | change


def _on_this_mesh(values: Mapping[str, Any]) -> Iterator[Change]:
    change: Change = {}
    if values["model"].get("remat") is False:
        change = {"model.remat": True}
        yield dict(change)
    data = values["data"]
    for times in MICRO_BATCHES if "micro_batches" in data else ():
        change |= {"data.micro_batches": data["micro_batches"] * times}
        if "rows" in data:  # Those of one micro-batch; elsewhere an update is split.
            if data["rows"] % times:
                break
            change |= {"data.rows": data["rows"] // times}
        yield dict(change)
    rollout = values.get("rollout")
    for times in (2, 4, 8) if rollout is not None else ():
        yield change | {"rollout.max_rows": max(1, _rows_at_once(rollout) // times)}


def _rows_at_once(rollout: Mapping[str, Any]) -> int:
    size = rollout.get("group_size", rollout.get("num_samples", 1))
    return min(rollout["max_rows"], rollout["num_prompts"] * size)


def with_changes(config: Config, change: Change) -> Config:
    """The config with other values. Raises ValueError if they do not go together."""
    values = to_dict(config)
    for key, value in change.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return type(config).model_validate_json(json.dumps(values))


def _at_least(program: Program) -> int:
    """Bytes of a device that no compilation will get rid of."""
    return sum(tree_bytes(tree) for tree in program.resident.values())
