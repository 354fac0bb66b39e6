"""Samples on stdin -> a line on stdout for each call of a reward function. Run by `pool`.

A script, started as one, so that it costs as little as an interpreter does. Its argument is the
number of the pipe that closes when the parent is gone. Lines are JSON. First in: what to load.
First out: that it is loaded, or why not. Then in: a batch of samples; out: the outcome of each call
at once, so that whoever waits knows which call hangs.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import sys
from typing import IO, Any


def main() -> None:
    _start_watchdog(int(sys.argv.pop()))
    owner = os.getpid()
    requests, outcomes = _claim_pipes()
    setup = json.loads(requests.readline())
    if setup["max_memory_bytes"]:
        limit = setup["max_memory_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.path[:] = setup["path"]

    from alignjax.core.errors import UserError
    from alignjax.rewards.functions import bind, describe, load, named_parts

    def send(message: Any) -> None:
        if os.getpid() != owner:
            os._exit(0)  # A reward forked and its child came back too: it has no say here.
        outcomes.write(json.dumps(message).encode() + b"\n")
        outcomes.flush()

    try:
        calls = {name: bind(load(path), args, path) for name, path, args in setup["functions"]}
    except UserError as fault:
        send({"fault": str(fault)})
        return
    send({"fault": None})

    for line in requests:
        for index, names, values in json.loads(line):
            for name in names:
                try:
                    # One function must not change what the next one sees.
                    own = copy.deepcopy(values) if len(names) > 1 else values
                    parts = named_parts(calls[name](own))
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


def _start_watchdog(lifeline: int) -> None:
    """A process that kills this one's group when the other end of a pipe closes.

    A process, since a thread cannot run while a C function holds the interpreter. It holds nothing
    but the lifeline: by the other pipes the parent sees that the worker died.
    """
    if os.fork():
        os.close(lifeline)
        return
    os.closerange(0, lifeline)  # Nothing above it is open yet.
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
