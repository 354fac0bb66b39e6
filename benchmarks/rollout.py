"""Speed of the demo's two halves: the engine that samples and the GRPO update on what it sampled.

The model, the rows and the lengths are those of configs/recipes/r1_zero.yaml, with random weights;
no stop token is given, so that every row takes all its tokens and the work is always the same.

    python benchmarks/rollout.py

Each repeat waits for its result. The first calls, which compile, are not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record

from alignjax.core.config import build, find_config, load
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Sampling
from alignjax.generate import make_generate
from alignjax.models import Model, ModelConfig
from alignjax.phases.grpo import grpo_loss
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.phases.sft import SftConfig
from alignjax.recipes.chains import TOKENS
from alignjax.recipes.graph import RecipeConfig
from alignjax.train.optim import make_optimizer
from alignjax.train.state import create_state
from alignjax.train.step import make_step


def timed(function: Callable[[], Any], num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat, and tokens per second: median, slowest and fastest."""
    for _ in range(2):  # Compiles; the second call meets what the first has changed.
        jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return {
        "tokens": num_tokens,
        "seconds": [round(s, 4) for s in seconds],
        "tokens_per_second": {
            "median": round(num_tokens / statistics.median(seconds)),
            "min": round(num_tokens / max(seconds)),
            "max": round(num_tokens / min(seconds)),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "rollout.json")
    args = parser.parse_args()

    recipe = build(RecipeConfig, load(find_config("recipes/r1_zero")))
    base, zero = recipe.stages["base"], recipe.stages["zero"]
    assert isinstance(base, SftConfig) and isinstance(zero, GrpoConfig)
    assert base.model.init is not None
    shape = {"vocab_size": len(TOKENS)} | base.model.init.model_dump(exclude_none=True)
    model = Model(
        ModelConfig(**shape), compute_dtype(zero.model.compute_dtype, jax.default_backend())
    )
    rollout = zero.rollout
    rows, prompt, completion = (
        rollout.num_prompts * rollout.group_size,
        rollout.max_prompt_tokens,
        rollout.max_tokens,
    )
    rng = np.random.default_rng(0)
    params = model.init(jax.random.PRNGKey(0))
    prompts = rng.integers(2, len(TOKENS), (rollout.num_prompts, prompt)).astype(np.int32)
    lengths = np.full(rollout.num_prompts, prompt, np.int32)
    sampling = Sampling(max_tokens=completion, num_samples=rollout.group_size)
    generate = make_generate(model, max_rows=rollout.max_rows)
    keys = iter(jax.random.split(jax.random.PRNGKey(1), args.repeats + 3))
    sampled = generate(params, prompts, lengths, next(keys), sampling)
    assert (sampled.lengths == completion).all()
    engine = timed(
        lambda: generate(params, prompts, lengths, next(keys), sampling),
        rows * completion,
        args.repeats,
    )
    print("engine", engine["tokens_per_second"])

    width = prompt + completion
    tokens = np.concatenate([np.repeat(prompts, rollout.group_size, 0), sampled.tokens], 1)
    is_completion = np.broadcast_to(np.arange(width) >= prompt, tokens.shape)
    old_logps = np.concatenate([np.zeros((rows, prompt), np.float32), sampled.logps], 1)
    advantages = np.broadcast_to(rng.normal(size=(rows, 1)).astype(np.float32), tokens.shape)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape),
        "mask": is_completion,
        "old_logps": old_logps,
        "advantages": np.where(is_completion, advantages, 0.0).astype(np.float32),
    }
    parts = zero.data.micro_batches
    batch = {
        name: jax.device_put(array.reshape(parts, rows // parts, width))
        for name, array in batch.items()
    }
    optimizer = make_optimizer(zero.optimizer, 100)
    step = make_step(
        lambda params, one: grpo_loss(
            model, params, one, zero.algorithm,
            temperature=rollout.temperature, max_tokens=completion,
        ),
        optimizer,
    )  # fmt: skip
    state = create_state(params, optimizer.transform, jax.random.PRNGKey(2))

    def update() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    first = update()
    difference = float(first["sampling/sampling_logp_difference/max"])
    grpo_update = timed(update, rows * width, args.repeats)
    print("update", grpo_update["tokens_per_second"], f"(sampler - trainer: {difference:.1e} nats)")
    record.write(
        args.out,
        {
            "note": args.note,
            "shapes": {
                "rows": rows,
                "prompt": prompt,
                "completion": completion,
                "micro_batches": parts,
                **shape,
            },
            "units": {
                "engine": "tokens sampled, prompts not counted",
                "grpo_update": "tokens forward and backward, prompts counted",
            },
            "figures": {
                "engine": engine,
                "grpo_update": grpo_update,
                "sampling_logp_difference_max_nats": difference,
            },
        },
    )


if __name__ == "__main__":
    main()
