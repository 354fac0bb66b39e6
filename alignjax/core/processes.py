"""What the processes of one run agree on. With a single one all of it costs nothing.

Each runs the same program on the same data; devices alone have different parts of the arrays. What
is not an array, such as files and the terminal, is the business of the first.

They ask each other by the device that a thread makes small arrays on: a thread that computes on
devices of its own (`jax.default_device`) may ask while others compute on theirs, for on each device
all processes then have the same order of work.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignjax.core.errors import UserError


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether it is True in any of the processes, all of which must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(_all(np.array(flag))))


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here: to the same name, or this is a bug."""
    names = gather(name)
    assert set(names) == {name}, f"processes are at {names}"


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order, in each of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = _all(np.array(len(text), np.int32))
    # A power of two: each size is compiled once.
    padded = np.zeros(1 << int(lengths.max() - 1).bit_length(), np.uint8)
    padded[: len(text)] = text
    rows = _all(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]


def told(value: Any) -> Any:
    """The JSON value of the first process, in each of them; what the others give is not read."""
    return gather(value if is_first() else None)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What stops one process with an error inside stops all of them, rather than to let the others
    wait for it.

    Raises:
      UserError: what was raised inside; or, in the others, that another process was stopped.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    is_stopped = any_of(problem is not None)
    if problem is not None:
        raise problem
    if is_stopped:
        raise UserError("stopped, for another process was: see what it says")


def _all(own: np.ndarray) -> np.ndarray:
    """What each process has, which is of one shape in all of them: [processes, ...]."""
    ours = jax.local_devices()
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    place = ours.index(default) if default in ours else 0
    devices = [jax.local_devices(process)[place] for process in range(jax.process_count())]
    mesh = Mesh(np.array(devices), ("process",))
    parts = NamedSharding(mesh, PartitionSpec("process"))
    there = jax.device_put(own[None], devices[jax.process_index()])
    shape = len(devices), *own.shape
    each = jax.make_array_from_single_device_arrays(shape, parts, [there])
    return np.asarray(jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(each))


def _same(x: jax.Array) -> jax.Array:
    return x
