"""Environments of the libraries, and their workers as processes that are asked for runs."""

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).resolve().parent / "workers"
REPO = WORKERS.parents[2]


class WorkerError(Exception):
    """What a worker said, or the end of what it printed if it said nothing."""


class KilledError(WorkerError):
    """It was, as Linux does where memory is short."""


@dataclass(frozen=True)
class Library:
    """Where a library runs."""

    name: str
    python: str
    script: Path


def library(name: str, folder: Path, also: Sequence[str] = ()) -> Library:
    """The environment of a library, made with the pinned versions if it is not there yet; ours is
    this one.

    Args:
      also: further requirements, such as of a GPU.
    Raises:
      subprocess.CalledProcessError: if pip fails.
    """
    script = WORKERS / f"{name}_worker.py"
    if name == "alignjax":
        return Library(name, sys.executable, script)
    requirements = WORKERS / f"requirements-{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + repr(sorted(also)).encode()).hexdigest()
    home = folder / f"env-{name}"
    python, stamp = home / "bin" / "python", home / "requirements.sha256"
    if not stamp.exists() or stamp.read_text() != digest:
        print(f"installing {name} into {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        subprocess.run([*install, "-r", requirements, *also], check=True)
        stamp.write_text(digest)
    return Library(name, str(python), script)


def environment(cpus: Sequence[int], device: str, cache: Path) -> dict[str, str]:
    """What all workers get: the same number of threads, nothing from the network.

    Args:
      cache: where JAX keeps compiled programs.
    """
    threads = str(len(cpus))
    found = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(REPO),
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    if device == "cpu":
        # XLA takes as many threads as it may run on: the affinity says how many.
        return found | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # Several wait beside each other, and none may take all memory.
    return found | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Worker:
    """A process that has loaded a task and does a run of it when asked."""

    def __init__(
        self,
        of: Library,
        spec: Mapping[str, Any],
        log: Path,
        *,
        cpus: Sequence[int],
        environment: Mapping[str, str],
        timeout_s: float,
    ):
        """Starts it. Args: cpus: those it is pinned to, none for any; log: what it prints."""
        self._timeout_s, self._log = timeout_s, log
        self._started = time.perf_counter()
        file = log.with_suffix(".json")
        file.write_text(json.dumps(spec), encoding="utf-8")
        pin = (lambda: os.sched_setaffinity(0, cpus)) if cpus else None
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [of.python, str(of.script), str(file)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment),
                preexec_fn=pin,
            )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _reply(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout_s)
        except queue.Empty:
            raise WorkerError(f"no answer within {self._timeout_s:g} s") from None
        if line is None:
            code = self._process.wait()
            tail = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            kind = KilledError if code == -signal.SIGKILL else WorkerError
            raise kind(f"ended with exit code {code}: " + " | ".join(tail))
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def ready(self) -> tuple[float, dict[str, Any]]:
        """Waits until it has loaded; seconds since it was started, and what it said before."""
        said: dict[str, Any] = {}
        while not (reply := self._reply()).get("ready"):
            said |= reply
        return time.perf_counter() - self._started, said

    def run(self) -> dict[str, Any]:
        """One run. Raises: WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # The reply says why.
        return self._reply()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def available_bytes() -> float:
    """Memory that a new process may take; infinite where the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else float("inf")
