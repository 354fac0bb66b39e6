"""Time and memory of attention with its gradient: all scores, in blocks, and jax.nn's, by length.

Chooses `alignjax.models.kernels.dispatch.MAX_SCORES`, from which on scores are not kept.

    python benchmarks/attention.py

The ways take turns, and of each the quickest turn counts: on a machine with other work the quickest
says most. Temporary memory is the compiler's own account (`compiled.memory_analysis()`), without
inputs and outputs, which are the same for all.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from jax import Array

from alignjax.models.kernels import attend
from alignjax.models.kernels.chunked import chunked_attention

B, H, K, HEAD_DIM = 1, 8, 4, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BLOCKS = (128, 256, 512)
TURNS = 5
TIMED = 4096
"""Longest row of which keeping all scores is timed; beyond, it takes half a minute a turn."""


def ways(length: int) -> dict[str, Callable[..., Array]]:
    """The implementations; blocks as long as the row have no point."""
    named = {name: functools.partial(attend, implementation=name) for name in ("einsum", "xla")}
    for block in BLOCKS:
        if block < length:
            named[f"chunked, {block} to a block"] = functools.partial(
                chunked_attention, block=block
            )
    return named


def compiled(way: Callable[..., Array], arrays: list[Array]) -> Any:
    """Value and gradient by q, k and v."""

    def total(q: Array, k: Array, v: Array, segments: Array) -> Array:
        out = way(q, k, v, segments, segments, scale=HEAD_DIM**-0.5)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(*arrays).compile()


def draw(length: int, dtype: jnp.dtype) -> list[Array]:
    """q, k, v and the segments of one document that fills the row."""
    rng = np.random.default_rng(0)
    shapes = [(B, length, H, HEAD_DIM), *[(B, K, HEAD_DIM, length)] * 2]
    return [
        *(jnp.array(rng.normal(size=shape), dtype) for shape in shapes),
        jnp.ones((B, length), jnp.int32),
    ]


def measure(length: int, dtype: jnp.dtype, turns: int) -> dict[str, dict[str, float]]:
    """By way: seconds of the quickest turn, where it is timed, and temporary bytes."""
    arrays = draw(length, dtype)
    programs = {name: compiled(way, arrays) for name, way in ways(length).items()}
    timed = {n: p for n, p in programs.items() if length <= TIMED or n.startswith("chunked")}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(turns):
        for name, program in timed.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            **({"min_s": round(min(seconds[name]), 5)} if name in timed else {}),
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
        for name, program in programs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "attention.json")
    args = parser.parse_args()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        for length in LENGTHS:
            # The longest rows take seconds: fewer turns do.
            turns = args.turns if length < 4096 else min(args.turns, 2)
            row = measure(length, dtype, turns)
            figures[f"{dtype.name}, T {length}"] = row
            for name, figure in row.items():
                memory = figure["temporary_bytes"] / 2**20
                clock = f"{figure['min_s'] * 1e3:9.1f} ms" if "min_s" in figure else " " * 12
                print(f"{dtype.name:9} T {length:5} {name:24} {clock} {memory:8.1f} MiB")
    record.write(
        args.out,
        {
            "note": args.note,
            "load_average": round(os.getloadavg()[1], 1),
            "shapes": {"B": B, "H": H, "K": K, "head_dim": HEAD_DIM, "mask": "causal"},
            "turns": {"below 4096": args.turns, "from 4096 on": min(args.turns, 2)},
            "units": {"min_s": "s, quickest turn of value and gradient"},
            "figures": figures,
        },
    )


if __name__ == "__main__":
    main()
