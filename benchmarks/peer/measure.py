"""A task and its variants -> the runs of each, by workers that take turns."""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer import table
from peer.process import KilledError, Library, Worker, WorkerError, available_bytes, environment
from peer.tasks import SIZES, TASKS, Task, work, write_data
from peer.variants import Variant

WARM_UP = {"alignjax": 2, "trl": 1, "tunix": 2, "llamacpp": 1}
"""Runs before those that count. What is compiled in the first may be compiled once more in the
second, which meets what the first has changed."""
SAME_LOGITS = 1e-4
"""How far logits may be apart, as a share of the largest; float32."""


@dataclass(frozen=True)
class Bench:
    """What all measurements share.

    Attributes:
      libraries: those that run; an exception's text for those that do not.
      limits: see `table.row`; `flops` by dtype.
      budget_s: after so many seconds of runs a variant gets no further round.
      again: start ours anew at the end, to see how long it takes with what is compiled on disk.
    """

    folder: Path
    libraries: Mapping[str, Library | str]
    cpus: Sequence[int]
    device: str
    rounds: int
    budget_s: float
    timeout_s: float
    limits: Mapping[str, float]
    again: bool = False

    def start(
        self, of: Library, spec: Mapping[str, Any], name: str, *, cold: bool = True
    ) -> Worker:
        """A worker. Args: cold: nothing is compiled yet."""
        logs, compiled = self.folder / "logs", self.folder / "compiled" / name
        logs.mkdir(parents=True, exist_ok=True)
        if cold:
            shutil.rmtree(compiled, ignore_errors=True)
        return Worker(
            of, spec, logs / f"{name}.log", cpus=self.cpus, timeout_s=self.timeout_s,
            environment=environment(self.cpus, self.device, compiled),
        )  # fmt: skip


@dataclass
class Measured:
    """A variant whose worker is ready, and what it has said so far."""

    variant: Variant
    start: Callable[..., Worker]
    worker: Worker
    prepare_s: float
    replies: list[dict[str, Any]]

    def counted(self) -> list[float]:
        """Seconds of the runs after the warm-up."""
        return [reply["seconds"] for reply in self.replies[WARM_UP[self.variant.library] :]]


def spec_of(task: Task, size: str, data: Path, models: Path, variant: Variant) -> dict[str, Any]:
    """What a worker reads."""
    return {
        "task": task.kind, "dims": task.dims, "data": str(data), "dtype": variant.dtype,
        "model": str(models / (f"{size}_untied" if task.is_untied else size)),
        "options": dict(variant.options), "options_of_worker": dict(variant.worker),
    }  # fmt: skip


def measure(bench: Bench, name: str, task: Task, size: str, chosen: Sequence[Variant]) -> Any:
    """All variants of a task -> its rows, and whether they alternated."""
    models = bench.folder / "models"
    data = bench.folder / "data" / f"{name}_{size}.jsonl"
    write_data(data, task, SIZES[size]["vocab_size"])
    rows: dict[Variant, table.Row] = {}
    live: list[Measured] = []
    alternates, peak = True, 0.0

    def fail(variant: Variant, error: object) -> None:
        rows[variant] = table.failed(variant.library, variant.name, str(error))

    def again(one: Measured) -> bool:
        """One more run, unless it has had enough; False if it failed."""
        if (counted := one.counted()) and sum(counted) > bench.budget_s:
            return True
        try:
            one.replies.append(one.worker.run())
        except WorkerError as error:
            fail(one.variant, error)
            one.worker.close()
            return False
        return True

    def finish(one: Measured) -> None:
        one.worker.close()
        limits = {"flops": bench.limits[f"{one.variant.dtype}_flops"], **bench.limits}
        found = rows[one.variant] = table.row(
            one.variant.library, one.variant.name, one.replies, prepare_s=one.prepare_s,
            num_warm_up=WARM_UP[one.variant.library], limits=limits,
            work=work(task, SIZES[size], one.replies[-1]["tokens"]),
        )  # fmt: skip
        if bench.again and one.variant.library == "alignjax":
            worker = one.start(cold=False)
            try:
                total = worker.ready()[0] + worker.run()["seconds"]
                found["warm_up_from_disk_seconds"] = total - found["seconds"]["median"]
            finally:
                worker.close()

    def begin(variant: Variant, of: Library) -> Measured | None:
        """With its warm-up behind it; None if it failed.

        Raises: KilledError: if others wait, beside whom it may have had no room.
        """
        print(f"  {variant.library} {variant.name} ...", flush=True)
        spec = spec_of(task, size, data, models, variant)
        label = f"{name}-{size}-{variant.library}-{variant.name.replace(' ', '-')}"
        start = functools.partial(bench.start, of, spec, label)
        worker = start()
        try:
            prepare_s, _ = worker.ready()
            replies = [worker.run() for _ in range(WARM_UP[variant.library])]
            return Measured(variant, start, worker, prepare_s, replies)
        except WorkerError as error:
            worker.close()
            if live and isinstance(error, KilledError):
                raise
            fail(variant, error)
            return None

    def finish_all() -> None:
        """Those that wait are measured now, one by one."""
        for waiting in live:
            if all(again(waiting) for _ in range(bench.rounds)):
                finish(waiting)
        live.clear()

    try:
        for variant in chosen:
            of = bench.libraries[variant.library]
            if variant.missing or isinstance(of, str):
                fail(variant, variant.missing or of)
                continue
            try:
                one = begin(variant, of)
            except KilledError:
                alternates = False
                finish_all()
                one = begin(variant, of)
            if one is None:
                continue
            live.append(one)
            peak = max(peak, one.replies[0]["peak_bytes"])
            if available_bytes() < 1.2 * peak:  # The next one might not fit either.
                alternates = False
                finish_all()
        for number in range(bench.rounds):
            live = [one for one in (live if number % 2 == 0 else live[::-1]) if again(one)]
        for one in live:
            finish(one)
    finally:
        for one in live:
            one.worker.close()
    return [rows[variant] for variant in chosen], alternates


def ask(bench: Bench, of: Library, spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a worker says before it is ready. Raises: WorkerError."""
    worker = bench.start(of, {"options": {}, "options_of_worker": {}, "dims": {}, **spec}, name)
    try:
        return worker.ready()[1]
    finally:
        worker.close()


def limits_of_machine(bench: Bench) -> dict[str, float]:
    """The best of what JAX and PyTorch reach; 0 where neither says."""
    found = {"float32_flops": 0.0, "bfloat16_flops": 0.0, "bytes": 0.0}
    for name in ("alignjax", "trl"):
        of = bench.libraries.get(name)
        if not isinstance(of, Library):
            continue
        try:
            said = ask(bench, of, {"task": "limits"}, f"limits-{name}")["limits"]
        except WorkerError as error:
            print(f"limits by {name}: {error}")
            continue
        found = {key: max(value, found[key]) for key, value in said.items()}
    return found


def check_logits(bench: Bench, size: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Versions of the libraries, and which of them compute something else than ours."""
    task = TASKS["generate"].quick()
    data = bench.folder / "data" / f"logits_{size}.jsonl"
    write_data(data, task, SIZES[size]["vocab_size"])
    versions, wrong, first = {}, {}, None
    for name, of in bench.libraries.items():
        if isinstance(of, str):
            continue
        out = bench.folder / f"logits_{name}.npy"
        spec = {
            "task": "logits", "data": str(data), "model": str(bench.folder / "models" / size),
            "dtype": "float32", "out": str(out),
        }  # fmt: skip
        try:
            versions[name] = ask(bench, of, spec, f"logits-{size}-{name}")["versions"]
        except WorkerError as error:
            wrong[name] = f"logits: {error}"
            continue
        found = np.load(out)
        first = found if first is None else first
        apart = float(np.abs(found - first).max() / np.abs(first).max())
        print(f"logits of {name}, {size}: at most {apart:.1e} of the largest from the first")
        if not apart <= SAME_LOGITS:
            wrong[name] = f"other logits, by {apart:.1e} of the largest"
    return versions, wrong
