"""What the processes of one run agree on. With a single one all of it costs nothing.

Each runs the same program on the same data; devices alone have different parts of the arrays. What
is not an array, such as files and the terminal, is the business of the first.

They ask each other by JAX's coordination service, not by their devices, so that nobody waits for
what devices have to do first. Threads of one name, one in each process, speak to each other, all in
one order; others may do so at the same time.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.distributed import global_state

from alignjax.core.errors import UserError

_FOREVER = 7 * 24 * 3600 * 1000
"""Milliseconds. Nobody waits in vain: the service ends a process when another one dies."""
_MEET_EVERY = 64
"""Messages between two times that all meet, after which what all have read is deleted."""


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether it is True in any of the processes, all of which must ask."""
    if jax.process_count() == 1:
        return flag
    return any(gather(flag))


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here: to the same name, or this is a bug."""
    names = gather(name)
    assert set(names) == {name}, f"processes are at {names}"


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order, in each of them."""
    if jax.process_count() == 1:
        return [value]
    return [json.loads(text) for text in _channel().gather(json.dumps(value).encode())]


def told(value: Any) -> Any:
    """The JSON value of the first process, in each of them; what the others give is not read."""
    if jax.process_count() == 1:
        return value
    return json.loads(sent_by(0, json.dumps(value).encode() if is_first() else b""))


def sent_by(process: int, data: bytes, *, is_heard: bool = True) -> bytes:
    """The bytes of one process, in each of them; what the others give is not read.

    Args:
      is_heard: False: this process needs no answer, and gets what it gives.
    """
    return _channel().send(process, data, is_heard)


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


class _Channel:
    """Messages between the threads of one name, in the order in which all of them call."""

    def __init__(self, name: str):
        self._name, self._count = name, 0
        self._own: list[str] = []

    def gather(self, data: bytes) -> list[bytes]:
        folder = self._next()
        own = f"{folder}/{jax.process_index()}"
        self._client.key_value_set_bytes(own, data)
        self._meet()
        self._own.append(own)
        found = dict(self._client.key_value_dir_get_bytes(folder))
        return [found[f"{folder}/{process}"] for process in range(jax.process_count())]

    def send(self, process: int, data: bytes, is_heard: bool) -> bytes:
        key = f"{self._next()}/{process}"
        if self._count % _MEET_EVERY == 0:
            self._meet()
        if process == jax.process_index():
            self._client.key_value_set_bytes(key, data)
            self._own.append(key)
        elif is_heard:
            return self._client.blocking_key_value_get_bytes(key, _FOREVER)
        return data

    @property
    def _client(self) -> Any:
        return global_state.client

    def _next(self) -> str:
        self._count += 1
        return f"alignjax/{self._name}/{self._count}"

    def _meet(self) -> None:
        """Returns when all have come here. They have read what was said to them before."""
        self._client.wait_at_barrier(f"alignjax/{self._name}", _FOREVER)
        for key in self._own:
            self._client.key_value_delete(key)
        self._own = []


_channels: dict[str, _Channel] = {}


def _channel() -> _Channel:
    """That of this thread."""
    name = threading.current_thread().name
    return _channels.setdefault(name, _Channel(name))
