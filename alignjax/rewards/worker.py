"""Samples on stdin -> a line on stdout for each call of a reward function. Run by `pool`.

A script, started as one, so that it costs as little as an interpreter does. Lines are JSON. First
in: what to load. First out: that it is loaded, or why not. Then in: a batch of samples; out: the
outcome of each call at once, so that whoever waits knows which call hangs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import signal
import sys
import threading
from typing import IO, Any


def main() -> None:
    requests, outcomes = _claim_pipes()
    setup = json.loads(requests.readline())
    _die_with_parent(setup["lifeline"])
    if setup["max_memory_bytes"]:
        limit = setup["max_memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.path[:] = setup["path"]

    from alignjax.core.errors import UserError
    from alignjax.rewards.functions import bind, describe, load, named_parts

    def send(message: Any) -> None:
        outcomes.write(json.dumps(message).encode() + b"\n")
        outcomes.flush()

    try:
        calls = {name: bind(load(path), args, path) for name, path, args in setup["functions"]}
    except UserError as fault:
        send({"fault": str(fault)})
        return
    send({"fault": None})

    for line in requests:
        for index, values in json.loads(line):
            for name, call in calls.items():
                try:
                    parts = named_parts(call(values))
                except BaseException as fault:  # sys.exit() in a reward must not end the worker
                    send([index, name, None, describe(fault)])
                    break
                send([index, name, parts, None])


def _claim_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Takes stdin and stdout for the protocol; a reward that reads finds nothing, and what it
    prints goes where stderr goes."""
    requests, outcomes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return requests, outcomes


def _die_with_parent(lifeline: int) -> None:
    """Ends this process when the other end of a pipe closes, i.e. when the parent is gone.

    Thread and signal, since each has a gap: the thread takes children of the reward function along
    but cannot run while a C function holds the interpreter; the signal (SIGIO, whose default is to
    end the process) needs no interpreter.
    """

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    with contextlib.suppress(OSError):  # not every system has it for pipes
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)


if __name__ == "__main__":
    main()
