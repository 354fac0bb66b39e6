"""What the processes of one run agree on. With a single one all of it costs nothing.

Each runs the same program on the same data; devices alone have different parts of the arrays. What
is not an array, such as files and the terminal, is the business of the first.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignjax.core.errors import UserError


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether it is True in any of the processes, all of which must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order, in each of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
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
