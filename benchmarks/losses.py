"""Time and memory of the value and gradient of each loss, ours against the obvious way.

B = 8 rows of T = 512 tokens, half of each a prompt. The loss is a function of hidden states and
the unembedding. Ours goes by `next_token_logps`; the naive way makes all logits, takes their
log-softmax and computes the same loss. Distillation, of two models' logits, is written out.

    python benchmarks/losses.py

Temporary memory is what the compiler reports on top of inputs and outputs. "alone" is the value and
gradient of the loss from log-probs that are there, without any vocabulary.
"""

import argparse
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from jax import Array

from alignjax import losses

B, T, D, V = 8, 512, 256, 16_384
Terms = Callable[[Array, dict[str, Array]], Array]


def token_losses() -> dict[str, Terms]:
    """Log-probs [B, T] and a batch -> the sum of a loss, for each that is of tokens."""

    def rl(algorithm: losses.Algorithm) -> Terms:
        return lambda logp, b: losses.policy_loss(
            algorithm, logp, b["old"], b["ref"], b["advantage"], b["mask"], b["segment_ids"],
            max_len=T,
        ).loss.total  # fmt: skip

    of_tokens = {f: getattr(losses, f) for f in ("cross_entropy", "dft")}
    found: dict[str, Terms] = {
        name: (lambda logp, b, f=f: losses.token_mean(f(logp, b["mask"]), b["mask"]).total)
        for name, f in of_tokens.items()
    }
    return found | {name: rl(a) for name, a in losses.PRESETS.items()}


def pair_losses() -> dict[str, Terms]:
    """The same of pairs: row 2 i is chosen over row 2 i + 1."""

    def of(loss: Callable[[losses.Pairs], Array]) -> Terms:
        def total(logp: Array, b: dict[str, Array]) -> Array:
            own, ref = (
                losses.sequence_logps(x, b["mask"], b["segment_ids"], num_segments=1)
                for x in (logp, b["ref"])
            )
            sums, refs, lengths = own.sums[:, 0], ref.sums[:, 0], own.lengths[:, 0]
            pairs = losses.Pairs(
                sums[::2], sums[1::2], refs[::2], refs[1::2], lengths[::2], lengths[1::2],
                jnp.ones(B // 2, bool),
            )  # fmt: skip
            return losses.example_mean(loss(pairs), pairs.is_valid).total

        return total

    found = {}
    for name in losses.__all__:
        function = getattr(losses, name)
        if inspect.isfunction(function):
            parameters = [*inspect.signature(function).parameters.values()]
            needed = [p.name for p in parameters if p.default is p.empty]
            if needed == ["pairs"] and name != "implicit_rewards":
                found[name] = of(function)
    return found


def ours(terms: Terms) -> Callable[..., Array]:
    def loss(hidden: Array, unembedding: Array, b: dict[str, Array]) -> Array:
        return terms(losses.next_token_logps(hidden, unembedding, b["tokens"], b["mask"]).logps, b)

    return loss


def naive(terms: Terms) -> Callable[..., Array]:
    def loss(hidden: Array, unembedding: Array, b: dict[str, Array]) -> Array:
        log_p = jax.nn.log_softmax(hidden[:, :-1] @ unembedding)
        logp = jnp.take_along_axis(log_p, b["tokens"][:, 1:, None], axis=2)[..., 0]
        return terms(jnp.pad(logp, ((0, 0), (1, 0))), b)

    return loss


def divergences() -> dict[str, tuple[Callable[..., Array], Callable[..., Array]]]:
    """Ours and the naive way of each divergence between student and teacher."""

    def total(x: Array, mask: Array) -> Array:
        return losses.token_mean(x, mask).total

    def of(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda h, w, b: total(
            function(h, w, b["teacher_hidden"], b["teacher_unembedding"], b["mask"]), b["mask"]
        )

    def full(divergence: Callable[[Array, Array], Array]) -> Callable[..., Array]:
        def loss(h: Array, w: Array, b: dict[str, Array]) -> Array:
            own = jax.nn.log_softmax(h[:, :-1] @ w)
            teacher = jax.nn.log_softmax(b["teacher_hidden"][:, :-1] @ b["teacher_unembedding"])
            return total(jnp.pad(divergence(own, teacher).sum(-1), ((0, 0), (1, 0))), b["mask"])

        return loss

    def half(p: Array, q: Array) -> Array:
        return jnp.exp(p) * (p - jnp.logaddexp(p, q) + jnp.log(2.0))

    return {
        "forward_kl": (of(losses.forward_kl), full(lambda s, t: jnp.exp(t) * (t - s))),
        "reverse_kl": (of(losses.reverse_kl), full(lambda s, t: jnp.exp(s) * (s - t))),
        "jsd": (of(losses.jsd), full(lambda s, t: 0.5 * (half(s, t) + half(t, s)))),
    }


def batch() -> tuple[Array, Array, dict[str, Array]]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    logp = -jnp.abs(normal(B, T))
    return normal(B, T, D), normal(D, V) / D**0.5, {
        "tokens": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "mask": jnp.arange(T)[None].repeat(B, 0) >= T // 2,
        "segment_ids": jnp.ones((B, T), jnp.int32),
        "old": logp,
        "ref": logp + 0.1 * normal(B, T),
        "advantage": normal(B, 1).repeat(T, 1),
        "teacher_hidden": normal(B, T, D),
        "teacher_unembedding": normal(D, V) / D**0.5,
    }  # fmt: skip


def measure(loss: Callable[..., Array], argnums: Any, args: tuple, repeats: int) -> dict[str, Any]:
    """Milliseconds of one call (median, least, most) and MiB of temporaries."""
    compiled = jax.jit(jax.value_and_grad(loss, argnums)).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        taken.append(1e3 * (time.perf_counter() - start))
    return {
        "ms": round(statistics.median(taken), 3),
        "ms_range": [round(min(taken), 3), round(max(taken), 3)],
        "temporary_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of losses; by default all")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "losses.json")
    args = parser.parse_args()
    hidden, unembedding, b = batch()
    ways = {name: (ours(f), naive(f), f) for name, f in {**token_losses(), **pair_losses()}.items()}
    ways |= {name: (*two, None) for name, two in divergences().items()}
    figures = {}
    print(f"{'':22} {'ours':>20} {'naive':>20} {'alone':>10}")
    for name, (own, other, alone) in ways.items():
        if args.only and name not in args.only:
            continue
        row = {
            way: measure(f, (0, 1), (hidden, unembedding, b), args.repeats)
            for way, f in (("ours", own), ("naive", other))
        }
        if alone is not None:
            row["alone"] = measure(alone, 0, (b["old"] - 0.05, b), 50 * args.repeats)
        figures[name] = row
        shown = [f"{r['ms']:8.0f} ms {r['temporary_mib']:5.0f} MiB" for r in row.values()][:2]
        last = f"{row['alone']['ms']:7.2f} ms" if alone is not None else ""
        print(f"{name:22} {shown[0]:>20} {shown[1]:>20} {last:>10}", flush=True)
    record.write(args.out, {"shapes": {"B": B, "T": T, "D": D, "V": V}, "figures": figures})


if __name__ == "__main__":
    main()
