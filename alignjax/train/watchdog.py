"""No step finished for so many minutes -> the stacks of all threads, on stderr and in a file."""

import contextlib
import faulthandler
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def watchdog(minutes: float | None, run_dir: Path) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with the number of each step that has finished.

    Where it is not called for so long, a sentence that names process, host and last step and the
    stacks of all threads go to stderr and to run_dir/stacks.PROCESS.txt, and again each time that
    as long has passed. Nothing is ended: a step may be slow, and of processes that wait for each
    other the stacks of all are needed to see which one does something else.

    Args:
      minutes: None: nothing is watched.
    """
    if minutes is None:
        yield lambda step: None
        return
    steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def watch() -> None:
        since, last = time.monotonic(), "none yet"
        while True:
            try:
                step = steps.get(timeout=60 * minutes)
            except queue.Empty:
                waited = (time.monotonic() - since) / 60
                _dump(f"no step has finished for {waited:.3g} minutes (the last: {last})", run_dir)
                continue
            if step is None:
                return
            since, last = time.monotonic(), str(step)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield steps.put
    finally:
        steps.put(None)
        thread.join()


def _dump(sentence: str, run_dir: Path) -> None:
    process = jax.process_index()
    path = run_dir / f"stacks.{process}.txt"
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    where = f"process {process} of {jax.process_count()} on {socket.gethostname()}"
    line = f"\n{now}: {where}: {sentence}; the stacks of its threads are also in {path}\n".encode()
    # Not by print and sys.stderr: the thread that hangs may hold their locks.
    os.write(2, line)
    faulthandler.dump_traceback(file=2)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            faulthandler.dump_traceback(file=file)
    except OSError as error:  # A file system that hangs may be why: stderr has them.
        print(f"{path} cannot be written: {error}", file=sys.stderr)
