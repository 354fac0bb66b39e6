"""Memory of sums over a large vocabulary on a long row: ours against the obvious way.

Compiles value and gradient of the mean log-prob, and of the mean reverse KL to a teacher, with
abstract shapes and reads the compiler's own account (`compiled.memory_analysis()`): nothing of that
size is allocated, so it runs anywhere.

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
TEACHER_D = 2048
"""Width of Qwen3-1.7B."""


def in_chunks(size: int) -> Callable[..., Array]:
    """`next_token_logps` with so many time steps at once."""

    def mean_logp(hidden: Array, unembedding: Array, tokens: Array, mask: Array) -> Array:
        out = losses.next_token_logps(hidden, unembedding, tokens, mask, chunk_size=size)
        return jnp.sum(out.logps) / jnp.sum(mask)

    return mean_logp


def naive(hidden: Array, unembedding: Array, tokens: Array, mask: Array) -> Array:
    """All logits in float32, log-softmax, the entries of the next tokens."""
    logps = _log_softmax(hidden, unembedding)
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.sum(jnp.where(mask[:, 1:], logps, 0.0)) / jnp.sum(mask)


def kl_in_chunks(size: int) -> Callable[..., Array]:
    """`reverse_kl` with so many time steps at once."""

    def mean_kl(*args: Array) -> Array:
        return jnp.sum(losses.reverse_kl(*args, chunk_size=size)) / jnp.sum(args[-1])

    return mean_kl


def naive_kl(
    hidden: Array, unembedding: Array, teacher: Array, teacher_unembedding: Array, mask: Array
) -> Array:
    """All logits of both in float32, log-softmax, the sum over the vocabulary."""
    logps = _log_softmax(hidden, unembedding)
    others = jax.lax.stop_gradient(_log_softmax(teacher, teacher_unembedding))
    kl = jnp.sum(jnp.exp(logps) * (logps - others), axis=-1)
    return jnp.sum(jnp.where(mask[:, 1:], kl, 0.0)) / jnp.sum(mask)


def _log_softmax(hidden: Array, unembedding: Array) -> Array:
    logits = jnp.matmul(
        hidden[:, :-1], unembedding.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return jax.nn.log_softmax(logits)


def of_tokens(dtype: jnp.dtype, length: int) -> list[jax.ShapeDtypeStruct]:
    """Hidden states, unembedding, tokens, mask."""
    return [
        jax.ShapeDtypeStruct((B, length, D), dtype),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, length), jnp.int32),
        jax.ShapeDtypeStruct((B, length), bool),
    ]


def of_two_models(dtype: jnp.dtype, length: int) -> list[jax.ShapeDtypeStruct]:
    """Hidden states and unembedding of the student, of the teacher, mask."""
    hidden, unembedding, _, mask = of_tokens(dtype, length)
    return [
        hidden,
        unembedding,
        jax.ShapeDtypeStruct((B, length, TEACHER_D), dtype),
        jax.ShapeDtypeStruct((TEACHER_D, V), jnp.float32),
        mask,
    ]


def measure(function: Callable[..., Array], shapes: list[jax.ShapeDtypeStruct]) -> dict[str, float]:
    """Bytes, by kind, of the compiled value and gradient by hidden states and unembedding."""
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
    sizes = {f"chunks of {ROWS_PER_CHUNK} (default)": ROWS_PER_CHUNK, "chunks of 128": 128}
    ways = {"naive": naive} | {name: in_chunks(size) for name, size in sizes.items()}
    kl_ways = {"naive": naive_kl} | {name: kl_in_chunks(size) for name, size in sizes.items()}
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for of, arguments, listed in (
        ("next_token_logps", of_tokens, ways),
        ("reverse_kl", of_two_models, kl_ways),
    ):
        for dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
            for length in (T, T // 4):
                row = {name: measure(way, arguments(dtype, length)) for name, way in listed.items()}
                figures.setdefault(of, {})[f"{dtype.name}, T {length}"] = row
                for name, figure in row.items():
                    gib = figure["temporary_bytes"] / 2**30
                    print(f"{of:16} {dtype.name:9} T {length:5} {name:24} {gib:6.2f} GiB")
    shapes = {"B": B, "D": D, "V": V, "teacher_D": TEACHER_D, "unembedding": "float32"}
    record.write(args.out, {"shapes": shapes, "figures": figures})


if __name__ == "__main__":
    main()
