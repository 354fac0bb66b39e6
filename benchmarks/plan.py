"""The roofline of `alignjax plan` against measured times: steps and decoding on one core of a CPU.

    taskset -c 0 python benchmarks/plan.py

The chip is this core: the peak of a product of float32 matrices and the bandwidth of its memory,
both measured first, in the same run. Of each shape the program that a phase runs is compiled, its
costs are counted from the HLO as a plan counts them, and it is run. Times are processor time, the
least of several calls: what else runs on the machine takes none of it, though it shares its caches.

One core does not compute while it waits for memory: beside the roofline, which takes the longer of
the two, stands their sum. Each is a bound; what it must be multiplied by to be a forecast is taken
from the other shapes, and the error stated.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import record

from alignjax.core.types import Sampling
from alignjax.generate import decode, make_generate
from alignjax.models import Model, ModelConfig
from alignjax.phases.grpo import grpo_loss
from alignjax.phases.grpo_config import AlgorithmConfig
from alignjax.phases.sft import sft_loss
from alignjax.plan.chips import Chip
from alignjax.plan.hlo import count
from alignjax.plan.local_chip import measured_cpu
from alignjax.plan.roofline import estimate
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.state import create_state
from alignjax.train.step import make_step

NUM_TIMES = 3


class Case(NamedTuple):
    kind: str
    """sft or grpo: a step. decode: up to 64 tokens of each row."""
    width: int
    layers: int
    vocab: int
    rows: int
    row_len: int
    """Of decode: tokens of a prompt."""
    remat: bool = False


CASES = {
    "sft, width 256": Case("sft", 256, 4, 4096, 8, 256),
    "sft, width 768": Case("sft", 768, 4, 8192, 2, 512, remat=True),
    "grpo, width 512": Case("grpo", 512, 4, 4096, 4, 256),
    "decode, 64 rows": Case("decode", 512, 8, 4096, 64, 128),
    "decode, 8 rows": Case("decode", 1024, 8, 8192, 8, 256),
}


class Prepared(NamedTuple):
    compiled: Any
    arguments: Callable[[], tuple[Any, ...]]
    """New ones for each call, which may overwrite them."""


def model_of(case: Case) -> tuple[Model, Any]:
    config = ModelConfig(
        family="qwen3", vocab_size=case.vocab, hidden_size=case.width, num_layers=case.layers,
        num_heads=case.width // 64, num_kv_heads=case.width // 128, head_dim=64,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = Model(config, remat=case.remat)
    return model, jax.jit(model.init)(jax.random.key(0))


def step_of(case: Case) -> Prepared:
    """The update of `sft` or `grpo` on full rows."""
    model, params = model_of(case)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    loss = functools.partial(sft_loss, model)
    if case.kind == "grpo":
        loss = functools.partial(
            grpo_loss, model, algorithm=AlgorithmConfig(preset="dapo"), temperature=1.0,
            max_tokens=case.row_len,
        )  # fmt: skip
    step = make_step(loss, optimizer)
    state = create_state(params, optimizer.transform, jax.random.PRNGKey(0))
    shape = 1, case.rows, case.row_len
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, case.vocab, shape), jnp.int32)
    batch = {
        "tokens": tokens, "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(case.row_len, dtype=jnp.int32), shape),
        "mask": jnp.ones(shape, bool).at[..., 0].set(False),
    }  # fmt: skip
    if case.kind == "grpo":
        logps = jnp.full(shape, -np.log(case.vocab), jnp.float32)
        batch |= {"old_logps": logps, "advantages": jnp.ones(shape, jnp.float32)}
    lowered = step.lower(state, batch)
    return Prepared(lowered.compile(), lambda: (jax.tree.map(jnp.copy, state), None, batch))


def decode_of(case: Case) -> Prepared:
    """`decode.advance`, caught where the engine calls it for the first time."""
    model, params = model_of(case)
    caught: list[Any] = []

    class CaughtError(Exception):
        pass

    def advance(*arguments: Any, **options: Any) -> Any:
        caught.append((arguments, options))
        raise CaughtError

    real, decode.advance = decode.advance, advance
    try:
        prompts = np.ones((case.rows, case.row_len), np.int32)
        sampling = Sampling(max_tokens=decode.STEPS + 1)
        make_generate(model)(
            params, prompts, np.full(case.rows, case.row_len), jax.random.PRNGKey(0), sampling
        )
    except CaughtError:
        pass
    finally:
        decode.advance = real
    (arguments, options) = caught[0]
    compiled = decode.advance.lower(*arguments, **options).compile()
    before, rows, after = arguments[:2], arguments[2], arguments[3:]
    return Prepared(compiled, lambda: (*before, jax.tree.map(jnp.copy, rows), *after))


def measure(case: Case, chip: Chip) -> dict[str, Any]:
    start = time.process_time()
    prepared = (decode_of if case.kind == "decode" else step_of)(case)
    compile_s = time.process_time() - start
    costs = count(prepared.compiled.as_text())
    if costs.unknown_loops or costs.unknown_kernels:
        raise RuntimeError(f"{case}: not all is counted: {costs}")
    expected = estimate(costs, chip)
    found = []
    for _ in range(1 + NUM_TIMES):  # The first one warms up.
        arguments = jax.block_until_ready(prepared.arguments())
        start = time.process_time()
        jax.block_until_ready(prepared.compiled(*arguments))
        found.append(time.process_time() - start)
    measured = min(found[1:])
    return {
        **case._asdict(),
        "gflop": costs.flops / 1e9,
        "gigabytes": costs.bytes / 1e9,
        "compute_s": expected.compute_s,
        "memory_s": expected.hbm_s,
        "bound": expected.bound,
        "roofline_s": expected.seconds,
        "measured_s": measured,
        "over_roofline": measured / expected.seconds,
        "over_sum": measured / (expected.compute_s + expected.hbm_s),
        "compile_s": compile_s,
    }


def factor(ratios: list[float]) -> float:
    """What rooflines are multiplied by to be forecasts: the geometric mean."""
    return float(np.exp(np.mean(np.log(ratios))))


def calibrated(ratios: dict[str, float]) -> dict[str, float]:
    """Error of each forecast with the factor of the other shapes: -0.2 is 20% too fast."""
    return {
        name: factor([other for key, other in ratios.items() if key != name]) / ratio - 1
        for name, ratio in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS / "plan.json")
    out = parser.parse_args().out
    chip = measured_cpu()
    print(f"{chip.bf16_flops / 1e9:.0f} GFLOP/s, {chip.hbm_bandwidth / 1e9:.0f} GB/s")
    shapes = {}
    for name, case in CASES.items():
        found = shapes[name] = measure(case, chip)
        print(
            f"{name}: roofline {found['roofline_s']:.3f} s ({found['bound']}), "
            f"measured {found['measured_s']:.3f} s, x {found['over_roofline']:.2f}"
        )
    result: dict[str, Any] = {
        "clock": "processor time, the least of several calls; the machine was shared",
        "chip": {
            "gflops": chip.bf16_flops / 1e9,
            "gigabytes_per_s": chip.hbm_bandwidth / 1e9,
            "dtype": "float32",
            "cores": 1,
        },
        "shapes": shapes,
    }
    for what in ("over_roofline", "over_sum"):
        ratios = {name: found[what] for name, found in shapes.items()}
        errors = calibrated(ratios)
        largest = max(abs(error) for error in errors.values())
        result[what] = {
            "factor": factor(list(ratios.values())),
            "error_with_the_factor_of_the_others": errors,
            "largest_error": largest,
        }
        print(f"{what}: x {result[what]['factor']:.2f}, then off by {largest:.0%} at most")
    record.write(out, result)


if __name__ == "__main__":
    main()
