"""The same work on alignjax, TRL, Tunix and, to generate, llama.cpp, side by side in one run.

    python benchmarks/peers.py                                   # everything: hours on one core
    python benchmarks/peers.py --tasks sft grpo --sizes M --rounds 2 --best
    python benchmarks/peers.py --tasks generate_ragged --sizes S --dtypes float32
    python benchmarks/peers.py --quick                           # does everything run? Minutes

Each peer runs in an environment of its own, which is made from pinned versions
(peer/workers/requirements-*.txt; llama.cpp is compiled for the processor, by cmake and a C++
compiler, in some minutes); the same random weights, read from the same files; the same data;
the same number of threads on the same cores. Before anything is timed all must have the same
logits; in each task the numbers of tokens and the first loss must agree. The first runs of each,
which compile, count as warm-up; the others alternate between the libraries where memory suffices
for all of them at once. What fails is shown with its error.

The settings of each are in peer/variants.py, the tasks in peer/tasks.py. FLOPs are those of the
plain computation over the fastest matrix product of the machine, as JAX or PyTorch reach it, and
bytes what decoding must read over the fastest reading of memory.

On a GPU, where `pip` finds the wheels:

    export CMAKE_ARGS=-DGGML_CUDA=ON  # of llama.cpp
    python benchmarks/peers.py --device gpu --also tunix=jax[cuda12]==0.10.2

Results are kept by task and size in results/peers.json, each with its commit: parts of the table
can be measured anew.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peer import table
from peer.measure import Bench, check_logits, limits_of_machine, measure
from peer.process import Library, library
from peer.tasks import SIZES, TARGETS, TASKS, Task, expected_tokens, write_model
from peer.variants import DTYPES, LIBRARIES, Variant, variants


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--peers", nargs="*", choices=LIBRARIES[1:], default=LIBRARIES[1:])
    parser.add_argument("--sizes", nargs="*", choices=["S", "M"], default=["S", "M"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, after the warm-up")
    parser.add_argument("--best", action="store_true", help="of each peer its best settings alone")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES), help="of ours")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of runs for each")
    parser.add_argument("--again", action="store_true", help="also our warm-up from disk")
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
    """Ours, and of the peers those that some task is measured with."""
    needed = {v.library for name in args.tasks for v in chosen(args, TASKS[name])}
    found: dict[str, Library | str] = {}
    for name in ("alignjax", *(peer for peer in args.peers if peer in needed)):
        also = [text.split("=", 1)[1] for text in args.also if text.startswith(f"{name}=")]
        try:
            found[name] = library(name, args.dir, also)
        except subprocess.CalledProcessError as error:
            found[name] = f"could not be installed: {error}"
    return found


def chosen(args: argparse.Namespace, task: Task) -> list[Variant]:
    """Those of the variants that are asked for, ours first."""
    found = [
        v
        for v in variants(task)
        if (v.dtype in args.dtypes if v.library == "alignjax" else v.library in args.peers)
    ]
    if not args.best:
        return found
    with_best = {v.library for v in found if v.name.startswith("best")}
    return [
        v
        for v in found
        if v.library == "alignjax"
        or v.name.startswith("best" if v.library in with_best else "default")
    ]


def main() -> None:
    # This process only asks JAX which devices there are.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args = arguments()
    args.dir = args.dir.resolve()
    sizes = ["T"] if args.quick else args.sizes
    cpus = args.cpus if args.device == "cpu" else []
    bench = Bench(
        args.dir, installed(args), cpus, args.device, rounds=1 if args.quick else args.rounds,
        budget_s=args.budget, timeout_s=args.timeout, limits={}, again=args.again,
    )  # fmt: skip
    for size in sizes:
        for is_untied in (False, True):
            folder = args.dir / "models" / (f"{size}_untied" if is_untied else size)
            write_model(folder, SIZES[size], is_untied=is_untied)
    versions: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for size in sizes:
        said, failures = check_logits(bench, size)
        versions, wrong = versions | said, wrong | failures
    bench = replace(bench, libraries={**bench.libraries, **wrong})
    bench = replace(bench, limits=limits_of_machine(bench))
    for name in args.tasks:
        task = TASKS[name].quick() if args.quick else TASKS[name]
        for size in (size for size in sizes if size in task.sizes):
            print(f"{name}, {size}", flush=True)
            rows, alternates = measure(bench, name, task, size, chosen(args, task))
            has_same_loss = task.kind in ("sft", "dpo")
            problems = table.disagreements(rows, expected_tokens(task), has_same_loss)
            targets = TARGETS.get((name, size), {})
            title = f"\n{name}, {size}: {task.dims}"
            print(table.table(title, rows, targets, problems) + "\n", flush=True)
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
                    "as_fast_as": table.ratios(rows), "targets": targets,
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
