"""Lines of JSON between `benchmarks/peers.py` and a worker: "run" in, seconds and tokens out.

A worker is started as `python NAME_worker.py SPEC`, with the path of a JSON file. It loads what it
needs, then serves: each line "run" on its standard input is one piece of work, answered by one line
on its standard output; the end of the input ends it. Standard library only, for this file runs in
the environment of each library.

A trainer owns its loop, so a worker cannot call it step by step. It calls `Gate.next` from inside
the loop instead, where one step has ended: that reports the step, and waits there for the next one.
The time of waiting is not counted.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def peak_bytes() -> int:
    """The largest resident memory of this process so far; 0 where /proc does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


class Gate:
    """Where a worker waits. What libraries print goes to standard error from here on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start: float | None = None

    def say(self, **reply: Any) -> None:
        """Answers outside of any run, such as `versions`."""
        print(json.dumps(reply), file=self._out, flush=True)

    def next(self, **done: Any) -> None:
        """Reports the run that ends here, if one was going on, and waits for the next.

        Args:
          done: of the run: `tokens`, and `loss` where it has one.
        """
        now = time.perf_counter()
        if self._start is None:
            self.say(ready=True)
        else:
            self.say(seconds=now - self._start, peak_bytes=peak_bytes(), **done)
        if sys.stdin.readline().strip() != "run":
            # A trainer that is left in mid-loop saves and joins threads; nothing here is kept.
            os._exit(0)
        self._start = time.perf_counter()

    def serve(self, run: Callable[[], dict[str, Any]]) -> NoReturn:
        """For what can be called: each run is a call of `run`, which returns what `next` takes."""
        self.next()
        while True:
            self.next(**run())


def main(tasks: dict[str, Callable[[dict[str, Any], Gate], None]]) -> None:
    """Runs the task that the spec names; a failure is reported as a line with its `error`."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    gate = Gate()
    try:
        tasks[spec["task"]](spec, gate)
        gate.say(error="the trainer ended by itself")
    except BaseException as error:
        traceback.print_exc()
        gate.say(error=f"{type(error).__name__}: {error}"[:2000])
    # Threads of a library that wait for something would keep the process.
    sys.stderr.flush()
    os._exit(1)


def reward(completion: str) -> float:
    """Some number that depends on the text and costs nothing: which does not matter here."""
    return (sum(completion[:64].encode()) % 7) / 7
