"""Samples -> scores, by reward functions in worker processes that are killed when they hang.

A worker is a fresh interpreter, not a fork: a process that has started JAX must not fork. It
answers call by call, so the parent knows whose call hangs or kills it: that sample alone has no
score, and the rest of its batch goes to the next worker. The processes that a reward started go
with its worker, but for those that no longer descend from it and left its group (a double fork with
setsid; setsid alone, if the worker died first or this process was itself killed).
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from alignjax.core.errors import UserError
from alignjax.core.types import Sample, Score
from alignjax.rewards.combine import RewardConfig, combine, names_for
from alignjax.rewards.plain import short, to_json

STARTUP_S = 120.0
"""Limit on importing the reward functions."""
MAX_BATCH = 32
"""Largest number of samples in one message."""


class RewardPool:
    """A `ScoreFn`. Thread-safe; close it, or use it as a context manager.

    Args:
      config: functions, weights and limits.
      log_path: file to which what the reward functions print is appended (its directory is made if
        missing); dropped if None.
    Raises:
      UserError: if a function cannot be loaded, or the config names reward models or judges, which
        score elsewhere (`phases.scoring`).
    """

    def __init__(self, config: RewardConfig, *, log_path: Path | None = None) -> None:
        if config.models or config.judges or not config.functions:
            others = (*config.models, *config.judges)
            raise UserError(
                f"rewards: functions alone are scored here, but models and judges have "
                f"{', '.join(others) or 'none'} and functions has "
                f"{', '.join(config.functions) or 'none'}; leave models and judges out"
            )
        self.config = config
        self._setup = {
            "functions": [[n, f.function, f.args] for n, f in config.functions.items()],
            "path": [p or os.getcwd() for p in sys.path],
            "max_memory_bytes": (config.max_memory_mb or 0) * 2**20,
        }
        self._log_path = log_path
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _close, self._workers, self._selector, os.getpid())
        try:
            self._start_workers()
            while not all(worker.is_idle for worker in self._workers):
                self._wait(_Round(config, ()))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """Scores, in order; one whose function fails has the value None and says why.

        Raises:
          UserError: if a worker that replaces a killed one cannot load the functions any more.
          RuntimeError: if the pool is closed.
        """
        with self._lock:
            if not self.close.alive:
                raise RuntimeError("this RewardPool is closed")
            work = _Round(self.config, samples)
            try:
                while work.num_open:
                    for worker in [w for w in self._workers if w.is_idle and w.has_ended]:
                        self._lost(worker, work)  # while it had nothing to do: nobody's fault
                    self._start_workers()
                    for worker in self._workers:
                        if worker.is_idle and work.todo:
                            worker.give(work.next_batch(), work, self.config.timeout_s)
                    self._wait(work)
            except BaseException:  # an interrupt: what busy workers still say is of no use
                for worker in [w for w in self._workers if not w.is_idle]:
                    self._workers.remove(worker)
                    worker.end()
                raise
        return [work.scores[i] for i in range(len(samples))]

    def _wait(self, work: _Round) -> None:
        """Handles what workers say, or do not say in time."""
        # The time before looking: only silence that is seen after the deadline counts, however late
        # this process itself is.
        now = time.monotonic()
        deadline = min(worker.deadline for worker in self._workers)
        patience = None if deadline == math.inf else max(0.0, deadline - now)
        events = self._selector.select(patience)
        spoke = set()
        for key, mask in events:
            worker: _Worker = key.data
            spoke.add(worker)
            if mask & selectors.EVENT_READ:
                lines, is_alive = worker.receive()
                if not all(worker.heard(line, work, self.config.timeout_s) for line in lines):
                    self._lost(worker, work, "its worker wrote something else than outcomes")
                    continue
                if not is_alive:
                    self._lost(worker, work)
                    continue
            if mask & selectors.EVENT_WRITE:
                worker.flush()
        for worker in list(self._workers):
            if worker not in spoke and worker.deadline <= now:
                limit_s = STARTUP_S if worker.is_starting else self.config.timeout_s
                self._lost(worker, work, f"no answer within {limit_s:g} s; its worker was killed")

    def _start_workers(self) -> None:
        while len(self._workers) < self.config.num_workers:
            self._workers.append(_Worker(self._setup, self._selector, self._log_path))

    def _lost(self, worker: _Worker, work: _Round, why: str | None = None) -> None:
        """A worker died, or `why` it has to: blames the call that it was in."""
        self._workers.remove(worker)
        # One whose pipe closed is about to exit: how it ended is worth a moment.
        status = worker.end(patience_s=0.0 if why else 1.0)
        why = why or _ending(status)
        if worker.is_starting:
            names = ", ".join(f.function for f in self.config.functions.values())
            raise UserError(f"a reward worker could not load {names}: {why}")
        if worker.batch:
            index, name = worker.call
            work.fail(index, name, why)
            work.todo.extend(worker.batch[1:])


class _Round:
    """The samples of one call of the pool, and what is known about them."""

    def __init__(self, config: RewardConfig, samples: Sequence[Sample]) -> None:
        self.config = config
        self.samples = samples
        self.scores: dict[int, Score] = {}
        self.parts: list[dict[str, dict[str, float]]] = [{} for _ in samples]
        self.encoded: dict[int, bytes] = {}
        self.names: dict[int, list[str]] = {}
        """Of each sample, the functions that are called."""
        self.todo: deque[int] = deque()
        for i, sample in enumerate(samples):
            try:
                self.names[i] = names_for(config.functions, sample.fields)
            except ValueError as error:
                self.scores[i] = Score(None, error=f"{error}; prompt {short(sample.prompt)}")
                continue
            if not self.names[i]:
                self.scores[i] = combine(config, {})
                continue
            try:
                self.encoded[i] = _encode(i, sample, self.names[i])
                self.todo.append(i)
            except ValueError as error:
                self.fail(i, self.names[i][0], str(error))

    @property
    def num_open(self) -> int:
        return len(self.samples) - len(self.scores)

    def next_batch(self) -> list[int]:
        """Many while there are many, few near the end, so that no worker is left with a queue."""
        size = len(self.todo) // (2 * self.config.num_workers)
        return [self.todo.popleft() for _ in range(max(1, min(size, MAX_BATCH)))]

    def add(self, index: int, name: str, parts: dict[str, float] | None, error: str | None) -> bool:
        """Notes the outcome of one call; True if it was the last one of its sample."""
        if parts is None:
            self.fail(index, name, str(error))
        else:
            self.parts[index][name] = parts
            if len(self.parts[index]) < len(self.names[index]):
                return False
            self.scores[index] = combine(self.config, self.parts[index])
        return True

    def fail(self, index: int, name: str, reason: str) -> None:
        sample, path = self.samples[index], self.config.functions[name].function
        self.scores[index] = Score(
            None,
            error=f"reward {name!r} ({path}): {reason}; prompt {short(sample.prompt)}, "
            f"completion {short(sample.completion)}",
        )


class _Worker:
    """One process, its pipes, and the calls that it has not answered yet."""

    def __init__(
        self, setup: dict[str, Any], selector: selectors.BaseSelector, log_path: Path | None
    ) -> None:
        lifeline, self._lifeline = os.pipe()
        try:
            if log_path is not None:
                log_path.parent.mkdir(parents=True, exist_ok=True)
            with Path(log_path or os.devnull).open("ab") as log:
                script = Path(__file__).with_name("worker.py")
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(script), str(lifeline)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    pass_fds=(lifeline,),
                    start_new_session=True,  # Ctrl-C is for the parent; a group to kill at once
                    # A reward that uses JAX must not take the accelerator from the trainer.
                    env={"OMP_NUM_THREADS": "1", **os.environ, "JAX_PLATFORMS": "cpu"},
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._selector = selector
        selector.register(self._out, selectors.EVENT_READ, self)
        self._unsent = b""
        self._unread = b""
        self.batch: list[int] = []
        self._names: dict[int, list[str]] = {}
        self._num_answered = 0
        self.is_starting = True
        self.deadline = time.monotonic() + STARTUP_S
        self._send(json.dumps(setup).encode())

    @property
    def is_idle(self) -> bool:
        return not (self.batch or self.is_starting)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def call(self) -> tuple[int, str]:
        """Sample and function of the call that it is in."""
        return self.batch[0], self._names[self.batch[0]][self._num_answered]

    def give(self, batch: list[int], work: _Round, timeout_s: float) -> None:
        self.batch, self._names, self._num_answered = batch, work.names, 0
        self.deadline = time.monotonic() + timeout_s
        self._send(b"[" + b",".join(work.encoded[i] for i in batch) + b"]")

    def heard(self, line: bytes, work: _Round, timeout_s: float) -> bool:
        """Notes what the worker says; False if it is not what a worker says at this point.

        Raises:
          UserError: if it says that it cannot load the functions.
        """
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return False
        match message:
            case {"fault": None} if self.is_starting:
                self.is_starting, self.deadline = False, math.inf
                return True
            case {"fault": str(fault)} if self.is_starting:
                raise UserError(fault)
            case [index, name, parts, error] if (
                self.batch and (index, name) == self.call and _is_outcome(parts, error)
            ):
                is_last = work.add(index, name, parts, error)
                if is_last:
                    self.batch.pop(0)
                self._num_answered = 0 if is_last else self._num_answered + 1
                self.deadline = time.monotonic() + timeout_s if self.batch else math.inf
                return True
        return False

    def receive(self) -> tuple[list[bytes], bool]:
        """The lines that are complete, and whether there can be more."""
        with suppress(BlockingIOError):
            data = os.read(self._out, 1 << 20)
            *lines, self._unread = (self._unread + data).split(b"\n")
            return lines, bool(data)
        return [], True

    def _send(self, line: bytes) -> None:
        self._unsent = line + b"\n"
        self.flush()

    def flush(self) -> None:
        """Writes what the pipe takes; asks to be called again for the rest."""
        with suppress(BlockingIOError):
            try:
                self._unsent = self._unsent[os.write(self._in, self._unsent) :]
            except BrokenPipeError:  # dead: reading from it says so too
                self._unsent = b""
        is_registered = self._in in self._selector.get_map()
        if self._unsent and not is_registered:
            self._selector.register(self._in, selectors.EVENT_WRITE, self)
        elif not self._unsent and is_registered:
            self._selector.unregister(self._in)

    def end(self, patience_s: float = 0.0) -> int:
        """Kills the process, unless it ends by itself in time, and those that it started.

        Returns:
          its exit status, negative where a signal ended it.
        """
        family: list[psutil.Process] = []
        with suppress(psutil.Error):  # Before it ends: then they are nobody's children.
            family = psutil.Process(self._process.pid).children(recursive=True)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        for child in family:
            with suppress(psutil.Error):
                child.kill()
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            if pipe.fileno() in self._selector.get_map():
                self._selector.unregister(pipe)
            pipe.close()
        os.close(self._lifeline)
        return self._process.wait()


def _close(workers: list[_Worker], selector: selectors.BaseSelector, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner exits; the workers are not its own
    while workers:
        workers.pop().end()
    selector.close()


def _encode(index: int, sample: Sample, names: list[str]) -> bytes:
    values = {
        **sample.fields,
        "prompt": sample.prompt,
        "completion": sample.completion,
        "reference": sample.reference,
        "num_tokens": sample.num_tokens,
        "is_truncated": sample.is_truncated,
    }
    items = []
    for name, value in values.items():
        try:
            items.append(f"{json.dumps(name)}: {to_json(value)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"field {name!r} cannot be given to it: {error}") from error
    return f"[{index}, {json.dumps(names)}, {{{', '.join(items)}}}]".encode()


def _is_outcome(parts: Any, error: Any) -> bool:
    if isinstance(parts, dict):
        return "" in parts and all(isinstance(x, float) for x in parts.values()) and error is None
    return parts is None and isinstance(error, str)


def _ending(status: int) -> str:
    if status >= 0:
        return f"its worker process ended with exit code {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"its worker process was ended by {name}{hint}"
