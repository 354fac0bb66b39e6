"""Seconds of a training step: SFT, DPO with its reference, GRPO; prompts apart and shared.

Qwen3-style models with random weights: S (256 wide, 4 layers, vocabulary 4,096) and M (512 wide,
8 layers, 32,768; 42M parameters). sft: 8 full rows of 256. dpo: 8 pairs of 128 + 128 + 128.
grpo: 8 prompts of 128 with 8 completions of 128. long: 2 prompts of 512 with 16 of 64. profile:
where the time of an iteration of grpo goes.

    python benchmarks/training.py --models S M --dtypes float32 bfloat16

Each task runs in a process of its own, so that its peak of memory is its own. Variants of a task
take turns, with a product of matrices between them for the peak of the hardware as it is then.
Compiling is not counted. On a shared machine read seconds of CPU time, and shares of the peak.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record

from alignjax.core.allocator import restart_with_huge_pages
from alignjax.core.types import Sampling
from alignjax.data import Element, pack, sequence_ids, share_prompts, shared_row_len
from alignjax.data.comparison_rows import pack_elements
from alignjax.generate import make_generate
from alignjax.models import Model, ModelConfig
from alignjax.phases.common import score_tokens
from alignjax.phases.grpo import grpo_loss
from alignjax.phases.grpo_config import AlgorithmConfig
from alignjax.phases.preference_config import LOSSES, Objective, Part
from alignjax.phases.preference_loss import Scorer, pair_loss, reference_logps
from alignjax.phases.sft import sft_loss
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.state import create_state
from alignjax.train.step import make_step

MODELS = {
    "S": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
          "intermediate_size": 768, "vocab_size": 4096},
    "M": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "head_dim": 64,
          "intermediate_size": 1536, "vocab_size": 32768},
}  # fmt: skip
GROUPS = {"grpo": (8, 8, 128, 128), "long": (2, 16, 512, 64)}
"""Prompts, completions of each, tokens of a prompt, tokens of a completion."""
TASKS = ("sft", "dpo", *GROUPS, "profile")
Rows = dict[str, np.ndarray]


def batches(task: str, vocab: int) -> dict[str, Rows]:
    """Rows [M, R, T] of each variant of a task: 4 micro-batches of rollouts, if there are rows."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(2, vocab, n).astype(np.int32)

    if task == "sft":
        full = [{"tokens": ids(256), "mask": np.arange(256) > 0} for _ in range(8)]
        found = {"packed": pack(full, num_rows=8, row_len=256)[0]}
    elif task == "dpo":
        elements = [
            Element(prompt=ids(128), completions=(ids(128), ids(128)), ranks=(1, 2))
            for _ in range(8)
        ]
        found = {
            "apart" if length == 512 else "shared": pack_elements(
                elements, num_rows=8, row_len=length, num_responses=2, shared_prompt=length == 385
            )
            for length in (512, 385)
        }
    else:
        num, group, prompt_len, length = GROUPS[task]
        total = prompt_len + length
        on = np.arange(total) >= prompt_len
        apart = [
            {
                "tokens": np.concatenate([prompt, ids(length)]),
                "mask": on,
                "old_logps": np.where(on, -np.log(vocab), 0).astype(np.float32),
                "advantages": np.where(on, rng.normal(), 0).astype(np.float32),
            }
            for prompt in [ids(prompt_len) for _ in range(num)]
            for _ in range(group)
        ]
        found = {"apart": pack(apart, num_rows=num * group, row_len=total)[0]}
        row_len = shared_row_len(prompt_len, length, group)
        shared = pack(share_prompts(apart, group), num_rows=num, row_len=row_len)[0]
        found["shared"] = {**shared, "sequence_ids": sequence_ids(shared)}
    most = 4 if task in GROUPS else 1

    def split(rows: Rows) -> Rows:
        parts = min(most, len(rows["mask"]))
        return {k: v.reshape(parts, len(v) // parts, *v.shape[1:]) for k, v in rows.items()}

    return {name: split(rows) for name, rows in found.items()}


def flops(task: str, shape: dict[str, int]) -> float:
    """Of the products of matrices that the task needs, each prompt once: 2 for each weight forward
    and 4 backward, and the same of the scores that are not masked. DPO's reference adds a forward
    pass. Nothing that is computed twice, or for padding, counts."""
    d, heads, kv = shape["hidden_size"], shape["num_heads"], shape["num_kv_heads"]
    width = shape["head_dim"]
    weights = shape["num_layers"] * (
        d * width * (2 * heads + 2 * kv) + 3 * d * shape["intermediate_size"]
    )
    if task == "sft":
        tokens, targets, pairs = 8 * 256, 8 * 255, 8 * 256**2 / 2
    else:
        num, group, prompt, length = {"dpo": (8, 2, 128, 128), **GROUPS}[task]
        tokens, targets = num * (prompt + group * length), num * group * length
        pairs = num * (prompt**2 / 2 + group * (length * prompt + length**2 / 2))
    forward = 2 * (weights * tokens + targets * d * shape["vocab_size"])
    forward += 2 * 2 * shape["num_layers"] * pairs * heads * width
    return forward * (4 if task == "dpo" else 3)


def make_model(name: str, dtype: Any) -> Model:
    config = ModelConfig(
        family="qwen3", max_position_embeddings=2048, tie_embeddings=True, **MODELS[name]
    )
    return Model(config, dtype)


def make_update(task: str, model: Model, rows: Rows, *, is_shared: bool) -> Callable[[], Any]:
    """A function that makes one update and returns its metrics. It keeps the state."""
    params = model.init(jax.random.PRNGKey(0))
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = create_state(params, optimizer.transform, jax.random.PRNGKey(1))
    batch = {k: jnp.asarray(v) for k, v in rows.items()}
    prepare: Callable[[], dict[str, Any]] = dict
    if task == "sft":
        loss: Any = functools.partial(sft_loss, model)
    elif task == "dpo":
        reference = model.init(jax.random.PRNGKey(0))
        scorer = Scorer(model, is_shared, 1)
        part = Part(1.0, LOSSES["dpo"], {"beta": 0.1})
        loss = functools.partial(pair_loss, scorer, Objective((part,), 1.0))
        of_reference = jax.jit(reference_logps, static_argnums=0)
        prepare = lambda: {"ref_logps": of_reference(scorer, reference, batch)}  # noqa: E731
    else:
        config = AlgorithmConfig(preset="dapo")
        loss = functools.partial(
            grpo_loss, model, algorithm=config, temperature=1.0, max_tokens=rows["mask"].shape[-1]
        )
    step = make_step(loss, optimizer)

    def update() -> Any:
        nonlocal state
        state, metrics = step(state, {**batch, **prepare()})
        return metrics

    return update


def clocked(function: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(task: str, name: str, dtype: str, repeats: int) -> dict[str, Any]:
    shape = MODELS[name]
    model = make_model(name, dtype)
    size = 1024
    square = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 4, lambda _, y: (x @ y) * 1e-3, x))
    variants = {
        variant: (make_update(task, model, rows, is_shared=variant == "shared"), rows)
        for variant, rows in batches(task, shape["vocab_size"]).items()
    }
    needed, found = flops(task, shape), {}
    for update, _ in variants.values():
        clocked(update)
    clocked(lambda: multiply(square))
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    peaks = []
    for _ in range(repeats):
        for variant, (update, _) in variants.items():
            times[variant].append(clocked(update))
        peaks.append(clocked(lambda: multiply(square)))
    peak = [4 * 2 * size**3 / statistics.median(column) for column in zip(*peaks, strict=True)]
    for variant, (_, rows) in variants.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[variant], strict=True))
        found[variant] = {
            "wall_s": round(wall, 3),
            "cpu_s": round(cpu, 3),
            "wall_s_each": [round(w, 3) for w, _ in times[variant]],
            "cpu_s_each": [round(c, 3) for _, c in times[variant]],
            "row_tokens": int(np.count_nonzero(rows["segment_ids"])),
            "tokens_per_cpu_s": round(np.count_nonzero(rows["segment_ids"]) / cpu),
            "frac_of_gemm_peak": round(needed / cpu / peak[1], 3),
        }
    return {
        "needed_gflop": round(needed / 1e9, 1),
        "gemm_gflops": {"wall": round(peak[0] / 1e9), "cpu": round(peak[1] / 1e9)},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "variants": found,
    }


def profile(name: str, dtype: str, repeats: int) -> dict[str, Any]:
    """Median seconds of CPU time of the parts of an iteration of grpo, rewards left out."""
    shape, (num, group, prompt_len, length) = MODELS[name], GROUPS["grpo"]
    model = make_model(name, dtype)
    params = model.init(jax.random.PRNGKey(0))
    generate = make_generate(model)
    prompts = np.random.default_rng(0).integers(2, shape["vocab_size"], (num, prompt_len))
    lengths = np.full(num, prompt_len)
    sampling = Sampling(max_tokens=length, num_samples=group)
    all_rows = batches("grpo", shape["vocab_size"])
    batch = {k: jnp.asarray(v) for k, v in all_rows["shared"].items()}
    updates = {
        f"update, prompts {variant}": make_update("grpo", model, rows, is_shared=True)
        for variant, rows in all_rows.items()
    }
    forward = jax.jit(
        lambda params, batch: jax.lax.map(lambda one: score_tokens(model, params, one).logps, batch)
    )
    transform = make_optimizer(OptimizerConfig(), 1000).transform
    move = jax.jit(lambda params, state: transform.update(params, state, params))
    state = transform.init(params)
    parts: dict[str, Callable[[], Any]] = {
        "sampling": lambda: generate(params, prompts, lengths, jax.random.PRNGKey(1), sampling),
        "rows on the host": lambda: batches("grpo", shape["vocab_size"]),
        **updates,
        "of the update: forward, shared": lambda: forward(params, batch),
        "of the update: optimizer": lambda: move(params, state),
    }
    for part in parts.values():
        clocked(part)
    return {
        part: round(statistics.median(clocked(function)[1] for _ in range(repeats)), 3)
        for part, function in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["S", "M"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "training.json")
    parser.add_argument("--one", action="store_true", help="used by itself: one task, as JSON")
    args = parser.parse_args()
    if args.one:
        task, name, dtype = args.tasks[0], args.models[0], args.dtypes[0]
        if task == "profile":
            found = profile(name, dtype, args.repeats)
        else:
            found = measure(task, name, dtype, args.repeats)
        print(json.dumps(found))
        return
    figures: dict[str, Any] = {}
    for name in args.models:
        for dtype in args.dtypes:
            for task in args.tasks:
                words = ["--one", "--models", name, "--dtypes", dtype, "--tasks", task]
                words += ["--repeats", str(args.repeats)]
                out = subprocess.run(
                    [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE
                )
                figures[f"{name} {dtype} {task}"] = found = json.loads(out.stdout)
                if task == "profile":
                    print(name, dtype, found)
                    continue
                for variant, each in found["variants"].items():
                    print(name, dtype, task, variant, each["wall_s"], "s,", each["cpu_s"],
                          "s of CPU,", each["frac_of_gemm_peak"], "of the peak")  # fmt: skip
    record.write(args.out, {"note": args.note, "models": MODELS, "figures": figures})


if __name__ == "__main__":
    restart_with_huge_pages()  # As the command line does.
    main()
