"""Memory of the log-probs of a long row over a large vocabulary: ours against the obvious way.

Compiles value and gradient of the mean log-prob with abstract shapes and reads the compiler's own
account (`compiled.memory_analysis()`): nothing of that size is allocated, so it runs anywhere.

    python benchmarks/logprob_memory.py

Temporary memory is what comes on top of inputs and outputs, which are the same for both.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import record
from jax import Array

from alignjax import losses
from alignjax.losses.vocabulary import ROWS_PER_CHUNK

B, T, D, V = 1, 4096, 1024, 151_936
"""One row of 4,096 tokens; width and vocabulary of Qwen3-0.6B."""


def in_chunks(size: int) -> Callable[..., Array]:
    """`next_token_logps` with so many time steps at once."""

    def mean_logp(hidden: Array, unembedding: Array, tokens: Array, mask: Array) -> Array:
        out = losses.next_token_logps(hidden, unembedding, tokens, mask, chunk_size=size)
        return jnp.sum(out.logps) / jnp.sum(mask)

    return mean_logp


def naive(hidden: Array, unembedding: Array, tokens: Array, mask: Array) -> Array:
    """All logits in float32, log-softmax, the entries of the next tokens."""
    logits = jnp.matmul(
        hidden[:, :-1], unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    logps = jax.nn.log_softmax(logits)
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.sum(jnp.where(mask[:, 1:], logps, 0.0)) / jnp.sum(mask)


def measure(function: Callable[..., Array], dtype: jnp.dtype) -> dict[str, float]:
    """Bytes, by kind, of the compiled value and gradient by hidden states and unembedding."""
    shapes = (
        jax.ShapeDtypeStruct((B, T, D), dtype),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
        jax.ShapeDtypeStruct((B, T), bool),
    )
    start = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*shapes).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_s": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS / "logprob_memory.json")
    args = parser.parse_args()
    ways = {"naive": naive, f"chunks of {ROWS_PER_CHUNK} (default)": in_chunks(ROWS_PER_CHUNK)}
    ways["chunks of 128"] = in_chunks(128)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        figures[dtype.name] = {name: measure(way, dtype) for name, way in ways.items()}
        for name, figure in figures[dtype.name].items():
            print(f"{dtype.name:9} {name:24} {figure['temporary_bytes'] / 2**30:6.2f} GiB")
    shapes = {"B": B, "T": T, "D": D, "V": V, "unembedding": "float32"}
    record.write(args.out, {"shapes": shapes, "figures": figures})


if __name__ == "__main__":
    main()
