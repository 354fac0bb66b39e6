"""Speed of the rollout engine, and of an earlier one beside it in the same run.

Random Qwen3-style weights: S is 256 wide with 4 layers and 4,096 tokens of vocabulary, M 512 wide
with 8 layers and 32,768. Cases: M, 64 prompts of 64 tokens and 128 new ones each; S, the same
prompts and 16 to 128 new ones; M, 4 prompts of 512 tokens with 16 samples of 64 new ones each.

    taskset -c 0 python benchmarks/engine.py --before ../checkout-of-an-earlier-commit

Each engine runs in a process of its own, and they take turns. Compilation is not counted. An engine
that knows no limit for each prompt computes all rows to the longest; tokens past a limit count for
nothing. `cpu` is the time of the process on its cores, which other work on the machine hardly
changes; `wall` is that of the clock.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record

from alignjax.core.types import Sampling
from alignjax.generate import make_generate
from alignjax.models import Model, ModelConfig

S = {"vocab_size": 4096, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
     "head_dim": 64, "intermediate_size": 768}  # fmt: skip
M = {"vocab_size": 32_768, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4,
     "head_dim": 64, "intermediate_size": 1536}  # fmt: skip


@dataclass(frozen=True)
class Case:
    shape: dict[str, int]
    num_prompts: int
    prompt: int
    num_samples: int
    new: int
    fewest: int
    """The limits of prompts on new tokens go evenly from this number to `new`."""

    @property
    def limits(self) -> np.ndarray:
        return np.linspace(self.fewest, self.new, self.num_prompts).round().astype(np.int32)


CASES = {
    "M 64 x 128": Case(M, 64, 64, 1, 128, 128),
    "S 64 x 16..128": Case(S, 64, 64, 1, 128, 16),
    "M prompt 512, G 16, 64 new": Case(M, 4, 512, 16, 64, 64),
}


def run_cases() -> None:
    """A worker: case and dtype in a line of JSON on stdin -> what a call took, on stdout."""
    made: dict[str, Any] = {}
    for line in sys.stdin:
        name, dtype = json.loads(line)
        case = CASES[name]
        if line not in made:
            made.clear()
            model = Model(ModelConfig(family="qwen3", **case.shape), dtype)
            made[line] = make_generate(model), model.init(jax.random.PRNGKey(0))
        generate, params = made[line]
        rng = np.random.default_rng(0)
        limits = rng.permutation(case.limits)
        prompts = rng.integers(0, case.shape["vocab_size"], (case.num_prompts, case.prompt))
        sampling = Sampling(max_tokens=case.new, num_samples=case.num_samples)
        how = {}
        if "max_tokens" in inspect.signature(generate.__call__).parameters:
            how["max_tokens"] = limits
        lengths = np.full(case.num_prompts, case.prompt)
        wall, cpu = time.perf_counter(), time.process_time()
        generate(params, prompts, lengths, jax.random.PRNGKey(1), sampling, **how)
        took = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "tokens": int(limits.sum()) * case.num_samples,
        }
        print(json.dumps(took), flush=True)


def worker(checkout: Path) -> subprocess.Popen[str]:
    """This script, with the library of a checkout."""
    env = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)


def ask(process: subprocess.Popen[str], request: str) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(request + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    tokens = runs[0]["tokens"]
    times = {kind: [round(run[kind], 3) for run in runs] for kind in ("wall", "cpu")}
    speeds = {
        f"tokens_per_{kind}_second": {
            "median": round(tokens / statistics.median(seconds)),
            "min": round(tokens / max(seconds)),
            "max": round(tokens / min(seconds)),
        }
        for kind, seconds in times.items()
    }
    return {"tokens": tokens, "seconds": times, **speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "engine.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return run_cases()

    checkouts = {"after": record.REPO} | ({"before": args.before} if args.before else {})
    workers = {name: worker(path) for name, path in checkouts.items()}
    figures: dict[str, Any] = {}
    for name in args.cases:
        for dtype in args.dtypes:
            request = json.dumps([name, dtype])
            runs: dict[str, list[dict[str, float]]] = {which: [] for which in workers}
            for turn in range(1 + args.repeats):
                for which, process in workers.items():
                    took = ask(process, request)
                    if turn:  # The first one compiles.
                        runs[which].append(took)
            found = {which: summary(each) for which, each in runs.items()}
            figures.setdefault(name, {})[dtype] = found
            print(
                name, dtype, {w: f["tokens_per_cpu_second"] for w, f in found.items()}, flush=True
            )
    for process in workers.values():
        process.communicate()
    before = {}
    if args.before:
        revision = ["git", "-C", str(args.before), "rev-parse", "HEAD"]
        before = {"before": subprocess.check_output(revision, text=True).strip()}
    record.write(args.out, {"note": args.note, **before, "figures": figures})


if __name__ == "__main__":
    main()
