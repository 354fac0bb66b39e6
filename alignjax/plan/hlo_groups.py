"""How an HLO collective says which devices work together -> lists of their numbers."""

from __future__ import annotations

import re
from math import prod

import numpy as np

_LISTS = re.compile(r"\breplica_groups=(\{\}|\{\{[\d,{}]*\}\})")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^\]]*\](?:T\([\d,]*\))?|[\d,]*)\))?"
    r" \{([^}]*)\}"
)
_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def groups(attributes: str, num_devices: int) -> list[list[int]]:
    """The groups of a collective; of a permutation the pairs of sender and receiver.

    Numbers are those of the program's devices, in the order of the mesh. The forms are
    `{{0,1},{2,3}}`, `{}` (all), `[2,2]<=[4]` with or without `T(1,0)` (numbers in order, reshaped
    and transposed), and `mesh['x'=2,'y'=2] {'y'}` (axes of a mesh, or parts of them, `'x':(1)2`).

    Raises:
      ValueError: on another form.
    """
    if found := _PAIRS.search(attributes):
        pairs = re.findall(r"\{(\d+),(\d+)\}", found.group(1))
        return [[int(source), int(target)] for source, target in pairs] or [[0]]
    if found := _LISTS.search(attributes):
        if found.group(1) == "{}":
            return [list(range(num_devices))]
        return [_numbers(one) for one in re.findall(r"\{([\d,]+)\}", found.group(1))]
    if found := _IOTA.search(attributes):
        shape, dims, axes = (_numbers(part or "") for part in found.groups())
        return _rows(_iota(dims, axes).reshape(shape))
    if found := _MESH.search(attributes):
        return _of_mesh(*found.groups())
    raise ValueError(f"no replica_groups of a known form in: {attributes[:200]}")


def _of_mesh(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    devices = np.arange(prod(sizes.values()))
    if device_ids and device_ids.startswith("["):
        dims, order = re.fullmatch(r"\[([\d,]*)\](?:T\(([\d,]*)\))?", device_ids).groups()  # type: ignore[union-attr]
        devices = _iota(_numbers(dims), _numbers(order or "")).reshape(-1)
    elif device_ids:
        devices = np.array(_numbers(device_ids))
    # An axis is split where a group has a part of it: (1)2 of 8 are the first 2 of [1, 2, 4].
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        parts[name].append((int(before or 1), int(size or sizes[name])))
    shape: list[int] = []
    inside: list[int] = []
    for name, full in sizes.items():
        done = 1
        for before, size in sorted(parts[name]):
            inside.append(len(shape) + 1)
            shape += [before // done, size]
            done = before * size
        shape.append(full // done)
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    members = prod(shape[axis] for axis in inside)
    return _rows(devices.reshape(shape).transpose(outside + inside).reshape(-1, members))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(dims: list[int], axes: list[int]) -> np.ndarray:
    devices = np.arange(prod(dims)).reshape(dims)
    return devices.transpose(axes) if axes else devices


def _rows(devices: np.ndarray) -> list[list[int]]:
    return [[int(number) for number in row] for row in devices]
