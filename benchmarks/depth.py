"""Size and compile time of the programs of training and sampling, at several numbers of layers.

Layers are stacked and scanned, so that neither may grow with depth: the same work, at any number of
layers, for whoever waits for a compiler. Each program is compiled several times, without a cache.

    python benchmarks/depth.py --note "machine shared"
"""

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import record

from alignjax.core.types import Sampling
from alignjax.generate import decode
from alignjax.generate.limits import make_limits
from alignjax.models import Model, ModelConfig
from alignjax.models.decoding import empty_own, empty_prompts
from alignjax.models.kernels.decode import Seats
from alignjax.phases.sft import sft_loss
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.state import TrainState
from alignjax.train.step import make_step

SHAPE = {
    "family": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_heads": 16,
    "num_kv_heads": 8, "vocab_size": 32768, "max_position_embeddings": 4096,
}  # fmt: skip
"""That of Qwen3-0.6B, but for the vocabulary."""
PROMPTS, SAMPLES, WIDTH = 4, 4, 128


def programs(num_layers: int, **shape: Any) -> dict[str, jax.stages.Lowered]:
    """What a run compiles, lowered from shapes alone, so that no weights are made: an update of
    sft with layers recomputed, the reading of prompts, and the adding of tokens to rows.

    Args:
      shape: as of `ModelConfig`; SHAPE if not given.
    """
    model = Model(ModelConfig(num_layers=num_layers, **(shape or SHAPE)), remat=True)
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key)
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params,
        jax.eval_shape(optimizer.transform.init, params), key,
    )  # fmt: skip
    rows = jax.ShapeDtypeStruct((2, 4, 256), jnp.int32)
    batch = {"tokens": rows, "segment_ids": rows, "positions": rows,
             "mask": jax.ShapeDtypeStruct(rows.shape, bool)}  # fmt: skip
    update = make_step(functools.partial(sft_loss, model), optimizer).lower(state, batch)

    sampling = Sampling(max_tokens=64, num_samples=SAMPLES)
    limits = make_limits(sampling, model.config.vocab_size)
    num = PROMPTS * SAMPLES
    prompts = jax.eval_shape(functools.partial(empty_prompts, model, PROMPTS, WIDTH))
    own = jax.eval_shape(functools.partial(empty_own, model, num, 64))

    def ints(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.int32)

    def flags(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, bool)

    keys = jax.ShapeDtypeStruct((num, 2), jnp.uint32)
    sampled = decode.Rows(
        keys, ints(num), ints(num), flags(num), flags(num),
        ints(num, limits.stops.shape[1]), None, Seats(ints(num), ints(num)), own,
    )  # fmt: skip
    where = {"model": model, "mesh": None}
    return {
        "update": update,
        "reading of prompts": decode.read_into.lower(
            params, prompts, ints(PROMPTS, WIDTH), ints(PROMPTS), ints(PROMPTS), **where
        ),
        "adding of tokens": decode.advance.lower(
            params, prompts, sampled, flags(num), limits, ints(), ints(), **where
        ),
    }


def measure(depths: Sequence[int], repeats: int) -> dict[str, dict[str, Any]]:
    """By program and number of layers: bytes of the program that goes to the compiler, median
    seconds of CPU time to compile it (depths in turn, so that a busy machine is fair to all), and
    bytes of what comes out."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for depth in depths:
            for name, lowered in programs(depth).items():
                start = time.process_time()
                compiled = lowered.compile()
                seconds = time.process_time() - start
                one = found.setdefault(name, {}).setdefault(str(depth), {"seconds_each": []})
                one["seconds_each"].append(round(seconds, 2))
                one["lowered_bytes"] = len(lowered.as_text())
                one["compiled_bytes"] = len(compiled.as_text())
                jax.clear_caches()
    for by_depth in found.values():
        for one in by_depth.values():
            one["seconds"] = statistics.median(one["seconds_each"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", nargs="+", type=int, default=[8, 32, 80])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "depth.json")
    args = parser.parse_args()
    found = measure(args.depths, args.repeats)
    for name, by_depth in found.items():
        for depth, one in by_depth.items():
            sizes = one["lowered_bytes"] // 1000, one["compiled_bytes"] // 1000
            print(
                f"{name}, {depth} layers: {one['seconds']} s of CPU, {sizes[0]} kB -> {sizes[1]} kB"
            )
    record.write(args.out, {"note": args.note, "shape": SHAPE, "programs": found})


if __name__ == "__main__":
    main()
