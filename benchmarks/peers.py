"""The same work on alignjax, TRL and Tunix, side by side in one run.

    python benchmarks/peers.py                                   # everything: hours on one core
    python benchmarks/peers.py --tasks sft grpo --sizes M --rounds 3
    python benchmarks/peers.py --quick                           # does everything run? Minutes

Each peer runs in an environment of its own, which is made from pinned versions
(peer_workers/requirements-*.txt); the same random weights, read from the same files; the same
data; the same number of threads on the same cores. Before anything is timed all must have the same
logits; in each task the numbers of tokens and the first loss must agree. The first run of each,
which compiles, counts as warm-up; the others alternate between the libraries where memory suffices
for all of them at once. What fails is shown with its error.

The settings of each are in peer_variants.py, the tasks in peer_tasks.py. FLOPs are those of the
plain computation over the fastest matrix product of the machine, as JAX or PyTorch reach it, and
bytes what decoding must read over the fastest reading of memory.

On a GPU, where `pip` finds the wheels:

    python benchmarks/peers.py --device gpu --also trl=vllm tunix=jax[cuda12]==0.10.2

Results are kept by task and size in results/peers.json, each with its commit: parts of the table
can be measured anew.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peer_table
from peer_process import Library, Worker, WorkerError, available_bytes, environment, library
from peer_tasks import SIZES, TARGETS, TASKS, Task, expected_tokens, work, write_data, write_model
from peer_variants import LIBRARIES, Variant, variants

SAME_LOGITS = 1e-4
"""How far logits may be apart, as a share of the largest; float32."""


@dataclass(frozen=True)
class Bench:
    """What all measurements share.

    Attributes:
      libraries: those that run; an exception's text for those that do not.
      limits: see `peer_table.row`; `flops` by dtype.
      budget_s: after so many seconds of runs a variant gets no further round.
    """

    folder: Path
    libraries: Mapping[str, Library | str]
    cpus: Sequence[int]
    device: str
    rounds: int
    budget_s: float
    timeout_s: float
    limits: Mapping[str, float]

    def start(self, of: Library, spec: Mapping[str, Any], name: str) -> Worker:
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return Worker(
            of, spec, logs / f"{name}.log", cpus=self.cpus, timeout_s=self.timeout_s,
            environment=environment(self.cpus, self.device, self.folder / "compiled"),
        )  # fmt: skip


@dataclass
class Measured:
    """A variant whose worker is ready, and what it has said so far."""

    variant: Variant
    worker: Worker
    prepare_s: float
    replies: list[dict[str, Any]]

    def seconds(self) -> float:
        return sum(reply["seconds"] for reply in self.replies[1:])


def spec_of(task: Task, size: str, data: Path, models: Path, variant: Variant) -> dict[str, Any]:
    """What a worker reads."""
    return {
        "task": task.kind, "dims": task.dims, "data": str(data), "dtype": variant.dtype,
        "model": str(models / (f"{size}_untied" if task.is_untied else size)),
        "options": dict(variant.options), "options_of_worker": dict(variant.worker),
    }  # fmt: skip


def measure(bench: Bench, name: str, task: Task, size: str, chosen: Sequence[Variant]) -> Any:
    """All variants of a task -> its rows, and whether they alternated."""
    shutil.rmtree(bench.folder / "compiled", ignore_errors=True)  # so that warm-up is cold
    models = bench.folder / "models"
    data = bench.folder / "data" / f"{name}_{size}.jsonl"
    write_data(data, task, SIZES[size]["vocab_size"])
    rows: dict[Variant, peer_table.Row] = {}
    live: list[Measured] = []
    alternates, peak = True, 0.0

    def fail(variant: Variant, error: object) -> None:
        rows[variant] = peer_table.failed(variant.library, variant.name, str(error))

    def again(one: Measured) -> bool:
        """One more run, unless it has had enough; False if it failed."""
        if len(one.replies) > 1 and one.seconds() > bench.budget_s:
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
        rows[one.variant] = peer_table.row(
            one.variant.library, one.variant.name, one.replies, prepare_s=one.prepare_s,
            work=work(task, SIZES[size], one.replies[-1]["tokens"]), limits=limits,
        )  # fmt: skip

    try:
        for variant in chosen:
            of = bench.libraries[variant.library]
            if variant.missing or isinstance(of, str):
                fail(variant, variant.missing or of)
                continue
            print(f"  {variant.library} {variant.name} ...", flush=True)
            spec = spec_of(task, size, data, models, variant)
            label = f"{name}-{size}-{variant.library}-{variant.name.replace(' ', '-')}"
            worker = bench.start(of, spec, label)
            try:
                prepare_s, _ = worker.ready()
                one = Measured(variant, worker, prepare_s, [worker.run()])
            except WorkerError as error:
                fail(variant, error)
                worker.close()
                continue
            live.append(one)
            peak = max(peak, one.replies[0]["peak_bytes"])
            if available_bytes() < 1.2 * peak:
                # The next one might not fit beside those that wait: measured now, one by one.
                alternates = False
                for waiting in live:
                    if all(again(waiting) for _ in range(bench.rounds)):
                        finish(waiting)
                live.clear()
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
    """The best of what JAX and PyTorch reach."""
    found: dict[str, float] = {}
    for name in ("alignjax", "trl"):
        of = bench.libraries.get(name)
        if isinstance(of, Library):
            said = ask(bench, of, {"task": "limits"}, f"limits-{name}")["limits"]
            found = {key: max(value, found.get(key, 0.0)) for key, value in said.items()}
    return found


def check_logits(bench: Bench, size: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Versions of the libraries, and which of them compute something else than ours."""
    import numpy as np

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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peers", nargs="*", choices=LIBRARIES[1:], default=LIBRARIES[1:])
    parser.add_argument("--sizes", nargs="*", choices=["S", "M"], default=["S", "M"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, after the warm-up")
    parser.add_argument("--variants", nargs="*", help="by name, such as best; default: all")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of runs for each")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one answer")
    parser.add_argument("--cpus", nargs="*", type=int, default=[0], help="cores to run on")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a round, no results")
    parser.add_argument("--also", nargs="*", default=[], help="PEER=REQUIREMENT to install besides")
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--dir", type=Path, default=Path("runs/peers"), help="environments, models")
    parser.add_argument("--out", type=Path, help="default: results/peers.json")
    return parser.parse_args()


def installed(args: argparse.Namespace) -> dict[str, Library | str]:
    found: dict[str, Library | str] = {}
    for name in ("alignjax", *args.peers):
        also = [text.split("=", 1)[1] for text in args.also if text.startswith(f"{name}=")]
        try:
            found[name] = library(name, args.dir, also)
        except subprocess.CalledProcessError as error:
            found[name] = f"could not be installed: {error}"
    return found


def chosen(args: argparse.Namespace, task: Task) -> list[Variant]:
    """Ours are always there."""
    peers = [v for v in variants(task) if v.library == "alignjax" or v.library in args.peers]
    if args.variants is None:
        return peers
    return [v for v in peers if v.library == "alignjax" or v.name in args.variants]


def main() -> None:
    # This process only asks JAX which devices there are.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args = arguments()
    args.dir = args.dir.resolve()
    sizes = ["T"] if args.quick else args.sizes
    cpus = args.cpus if args.device == "cpu" else []
    settings = {"rounds": 1 if args.quick else args.rounds, "budget_s": args.budget}
    bench = Bench(
        args.dir, installed(args), cpus, args.device, **settings, timeout_s=args.timeout, limits={}
    )
    for size in sizes:
        for is_untied in (False, True):
            folder = args.dir / "models" / (f"{size}_untied" if is_untied else size)
            write_model(folder, SIZES[size], is_untied=is_untied)
    versions: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for size in sizes:
        said, failures = check_logits(bench, size)
        versions, wrong = versions | said, wrong | failures
    bench = Bench(**{**vars(bench), "libraries": {**bench.libraries, **wrong}})
    bench = Bench(**{**vars(bench), "limits": limits_of_machine(bench)})
    for name in args.tasks:
        task = TASKS[name].quick() if args.quick else TASKS[name]
        for size in (size for size in sizes if size in task.sizes):
            print(f"{name}, {size}", flush=True)
            rows, alternates = measure(bench, name, task, size, chosen(args, task))
            problems = peer_table.disagreements(rows, expected_tokens(task))
            targets = TARGETS.get((name, size), {})
            title = f"\n{name}, {size}: {task.dims}"
            print(peer_table.table(title, rows, targets, problems) + "\n", flush=True)
            if args.quick:
                continue
            keep(
                args.out,
                f"{name}, {size}",
                {
                    "task": asdict(task), "model": SIZES[size], "cpus": len(cpus) or args.device,
                    "rounds": args.rounds, "alternating": alternates, "note": args.note,
                    "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
                    "versions_of_peers": versions, "limits": dict(bench.limits), "rows": rows,
                    "as_fast_as": peer_table.ratios(rows), "targets": targets,
                    "not_the_same_work": problems,
                },
            )  # fmt: skip


def keep(path: Path | None, name: str, result: Mapping[str, Any]) -> None:
    """Writes one measurement among the others, each under its own circumstances."""
    import record

    path = path or record.RESULTS / "peers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = {**record.circumstances(), **result}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
