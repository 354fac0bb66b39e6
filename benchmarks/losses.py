"""Time and memory of the value and gradient of each loss, ours against the obvious way.

B = 8 rows of T = 512 tokens, half of each a prompt. The loss is a function of hidden states and
the unembedding. Ours goes by `next_token_logps`; the naive way makes all logits, takes their
log-softmax and computes the same loss. Losses that ask more of the logits are written out.

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
    dual = losses.Algorithm("group_zscore", "dual_clip", "token_mean")
    exact = losses.Algorithm(
        "group_zscore", "ppo_clip", "token_mean", kl="weighted_k3", kl_coef=0.04
    )
    algorithms = {**losses.PRESETS, "dual_clip": dual, "weighted_k3": exact}
    return found | {name: rl(a) for name, a in algorithms.items()}


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

    half = jnp.full(B // 2, 0.5)
    found = {
        "soft_dpo": of(lambda pairs: losses.soft_dpo(pairs, half)),
        "bco": of(lambda pairs: losses.bco(pairs, jnp.float32(0.1))),
        "wpo": of(lambda pairs: losses.wpo(pairs, half)),
        "kto": of(
            lambda p: (
                losses.kto(p.chosen, p.ref_chosen, half > 0, jnp.float32(0.1), p.is_valid)
                + losses.kto(p.rejected, p.ref_rejected, half < 0, jnp.float32(0.1), p.is_valid)
            )
        ),
    }
    for name in losses.__all__:
        function = getattr(losses, name)
        if inspect.isfunction(function):
            parameters = [*inspect.signature(function).parameters.values()]
            needed = [p.name for p in parameters if p.default is p.empty]
            if needed == ["pairs"] and name != "implicit_rewards":
                found[name] = of(function)
    return found


def without_vocabulary() -> dict[str, Terms]:
    """Losses of scores and values [B, T], whose naive formulation is their formula."""
    ranks = jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0) % 8
    on, some = jnp.ones(B, bool), jnp.ones((B, 8), bool)

    def mean(x: Array, valid: Array) -> Array:
        return losses.example_mean(x, valid).total

    return {
        "clipped_value_loss": lambda x, b: (
            losses.token_mean(
                losses.clipped_value_loss(x, b["old"], b["ref"], b["mask"]).loss, b["mask"]
            ).total
        ),
        "process_reward": lambda x, b: (
            losses.token_mean(
                losses.process_reward(x, jnp.exp(b["old"]), b["mask"]), b["mask"]
            ).total
        ),
        "bradley_terry": lambda x, b: mean(losses.bradley_terry(x[:, 0], x[:, 1], on), on),
        "kwise_ranking": lambda x, b: mean(losses.kwise_ranking(x[:, :8], ranks[:, :8], some), on),
        "plackett_luce": lambda x, b: mean(losses.plackett_luce(x[:, :8], ranks[:, :8], some), on),
        "regression": lambda x, b: mean(losses.regression(x[:, 0], b["ref"][:, 0], on), on),
    }


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


Way = Callable[[Array, Array, dict[str, Array]], Array]
K = 32
"""Of a teacher's most likely tokens."""


def of_logits() -> dict[str, tuple[Way, Way]]:
    """Ours and the naive way of each loss that asks more of the logits than a token's log-prob."""

    def total(x: Array, b: dict[str, Array]) -> Array:
        return losses.token_mean(x, b["mask"]).total

    def statistic(name: str, loss: Callable[..., Array]) -> Way:
        def way(h: Array, w: Array, b: dict[str, Array]) -> Array:
            flag = {f"with_{name}": True}
            out = losses.next_token_logps(h, w, b["tokens"], b["mask"], **flag)
            return total(loss(out, b["mask"]), b)

        return way

    def compared(function: Callable[..., Array]) -> Way:
        return lambda h, w, b: total(
            function(h, w, b["teacher_hidden"], b["teacher_unembedding"], b["mask"]), b
        )

    def full(terms: Callable[..., Array]) -> Way:
        """Terms of all logits [B, T - 1, V] of the student, and of the next tokens' teacher."""

        def way(h: Array, w: Array, b: dict[str, Array]) -> Array:
            later = {k: b[k][:, 1:] for k in ("tokens", "teacher_ids", "teacher_logps")}
            later["teacher"] = b["teacher_hidden"][:, :-1] @ b["teacher_unembedding"]
            return total(jnp.pad(terms(h[:, :-1] @ w, later), ((0, 0), (1, 0))), b)

        return way

    def smoothed(z: Array, later: dict[str, Array]) -> Array:
        log_p = jax.nn.log_softmax(z)
        logp = jnp.take_along_axis(log_p, later["tokens"][..., None], axis=2)[..., 0]
        return -0.9 * logp - 0.1 * log_p.mean(-1)

    def of_both(divergence: Callable[[Array, Array], Array]) -> Way:
        return full(
            lambda z, later: divergence(
                jax.nn.log_softmax(z), jax.nn.log_softmax(later["teacher"])
            ).sum(-1)
        )

    def half(p: Array, q: Array) -> Array:
        return jnp.exp(p) * (p - jnp.logaddexp(p, q) + jnp.log(2.0))

    def top_k(z: Array, later: dict[str, Array]) -> Array:
        teacher = later["teacher_logps"]
        own = jnp.take_along_axis(jax.nn.log_softmax(z), later["teacher_ids"], axis=2)
        rest, own_rest = (1 - jnp.exp(x).sum(-1) for x in (teacher, own))
        top = (jnp.exp(teacher) * (teacher - own)).sum(-1)
        return top + rest * (jnp.log(rest) - jnp.log(own_rest))

    return {
        "label_smoothed": (
            statistic("mean_logp", lambda o, m: losses.label_smoothed(o.logps, o.mean_logps, m)),
            full(smoothed),
        ),
        "z_loss": (
            statistic("log_normalizer", lambda o, m: losses.z_loss(o.log_normalizers, m)),
            full(lambda z, later: jax.nn.logsumexp(z, -1) ** 2),
        ),
        "entropy_bonus": (
            statistic("entropy", lambda o, m: losses.entropy_bonus(o.entropies, m)),
            full(lambda z, later: jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z), -1)),
        ),
        "forward_kl": (compared(losses.forward_kl), of_both(lambda s, t: jnp.exp(t) * (t - s))),
        "reverse_kl": (compared(losses.reverse_kl), of_both(lambda s, t: jnp.exp(s) * (s - t))),
        "jsd": (compared(losses.jsd), of_both(lambda s, t: 0.5 * (half(s, t) + half(t, s)))),
        "top_k_forward_kl": (
            lambda h, w, b: total(
                losses.top_k_forward_kl(h, w, b["teacher_ids"], b["teacher_logps"], b["mask"]), b
            ),
            full(top_k),
        ),
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
        "teacher_ids": jnp.asarray(
            K * rng.integers(0, V // K, (B, T, K)) + np.arange(K), jnp.int32
        ),
        "teacher_logps": jax.nn.log_softmax(normal(B, T, K)) - 0.1,
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
        "value": float(compiled(*args)[0]),
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
    whole = {
        name: (ours(f), naive(f), f) for name, f in {**token_losses(), **pair_losses()}.items()
    }
    whole |= {name: (*two, None) for name, two in of_logits().items()}
    whole |= {name: (None, None, f) for name, f in without_vocabulary().items()}
    figures: dict[str, dict[str, Any]] = {}
    print(f"{'':22} {'ours':>20} {'naive':>20} {'alone':>10}")
    for name, (own, other, alone) in whole.items():
        if args.only and name not in args.only:
            continue
        row = figures[name] = {}
        line = f"{name:22}"
        for way, f in (("ours", own), ("naive", other)):
            if f is not None:
                row[way] = r = measure(f, (0, 1), (hidden, unembedding, b), args.repeats)
                line += f" {r['ms']:8.0f} ms {r['temporary_mib']:5.0f} MiB"
        if own is not None and abs(row["ours"]["value"] / row["naive"]["value"] - 1) > 1e-3:
            raise SystemExit(f"{name}: {row} are not the same loss")
        if alone is not None:
            row["alone"] = r = measure(alone, 0, (b["old"] - 0.05, b), 50 * args.repeats)
            line += f" {r['ms']:9.2f} ms" if own else f" {'':42} {r['ms']:9.2f} ms"
        print(line, flush=True)
    record.write(args.out, {"shapes": {"B": B, "T": T, "D": D, "V": V}, "figures": figures})


if __name__ == "__main__":
    main()
