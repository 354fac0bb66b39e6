"""Chunked log-probs against loops in float64, and what they must never do: hold [B, T, V]."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.losses import next_token_logps, vocabulary

B, T, D, V = 8, 13, 6, 18
TAU = 0.7


def oracle(hidden, unembedding, tokens, mask, tau, g_logps, g_entropies):
    """Loops over the definition, and the textbook derivatives of
    L = sum(g_logps * logps) + sum(g_entropies * entropies):
    d log p_y / d z = onehot(y) - p,  d H / d z = -p (log p + H),  z = hidden @ unembedding / tau.
    """
    h, w = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    logps, entropies, is_argmax = np.zeros(mask.shape), np.zeros(mask.shape), np.zeros(mask.shape)
    d_h, d_w = np.zeros(h.shape), np.zeros(w.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        if t == 0:
            continue
        x, y = h[b, t - 1], tokens[b, t]
        z = x @ w / tau
        log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
        p = np.exp(log_p)
        entropy = -(p * log_p).sum()
        logps[b, t], entropies[b, t], is_argmax[b, t] = log_p[y], entropy, z.argmax() == y
        d_z = g_logps[b, t] * (np.eye(len(z))[y] - p) - g_entropies[b, t] * p * (log_p + entropy)
        d_h[b, t - 1] = w @ d_z / tau
        d_w += np.outer(x, d_z) / tau
    return logps, entropies, is_argmax.astype(bool), d_h, d_w


def batch(seed=0, shape=(B, T), dim=D, vocab=V, dirty=True):
    """Random ragged rows, one with all targets, one with none; dirt on what must not matter."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*shape, dim)).astype(np.float32)
    unembedding = rng.normal(size=(dim, vocab)).astype(np.float32)
    tokens = rng.integers(0, vocab, shape).astype(np.int32)
    mask = rng.random(shape) < 0.4
    mask[1], mask[2 % len(mask)] = True, False
    grads = rng.normal(size=(2, *shape)).astype(np.float32)
    if dirty:
        on = mask.copy()
        on[:, 0] = False
        tokens[~on] = rng.choice([-7, vocab, 10**6], (~on).sum())
        hidden[~np.roll(on, -1, axis=1)] = np.nan
        hidden[0, -1] = np.inf
    return hidden, unembedding, tokens, mask, grads


def scalar(hidden, unembedding, tokens, mask, grads, **options):
    """Weighted sum of all that is differentiable: its gradients test every path of the backward."""
    out = next_token_logps(hidden, unembedding, tokens, mask, with_entropy=True, **options)
    return jnp.sum(out.logps * grads[0]) + jnp.sum(out.entropies * grads[1]), out


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
def test_values_and_gradients_against_loops(chunk_size):
    hidden, unembedding, tokens, mask, grads = batch()
    expected = oracle(hidden, unembedding, tokens, mask, TAU, *grads)

    def loss(h, w):
        return scalar(h, w, tokens, mask, grads, temperature=TAU, chunk_size=chunk_size)

    (d_h, d_w), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, unembedding)
    np.testing.assert_allclose(out.logps, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.entropies, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.is_argmax, expected[2])
    np.testing.assert_allclose(d_h, expected[3], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(d_w, expected[4], rtol=1e-5, atol=5e-6)
    assert expected[2].any() and out.logps.dtype == out.entropies.dtype == jnp.float32
    off = ~mask
    off[:, 0] = True
    for x in (out.logps, out.entropies, out.is_argmax, np.roll(d_h, 1, axis=1).any(-1)):
        assert (np.asarray(x)[off] == 0).all(), "exactly 0 off mask"


def test_the_oracles_gradients_against_finite_differences():
    hidden, unembedding, tokens, mask, grads = batch(dirty=False)
    rng, step = np.random.default_rng(9), 1e-5

    def value(h, w):
        logps, entropies, *_ = oracle(h, w, tokens, mask, TAU, *grads)
        return (logps * grads[0]).sum() + (entropies * grads[1]).sum()

    *_, d_h, d_w = oracle(hidden, unembedding, tokens, mask, TAU, *grads)
    a, c = rng.normal(size=hidden.shape), rng.normal(size=unembedding.shape)
    h, w = hidden.astype(np.float64), unembedding.astype(np.float64)
    slope_h = (value(h + step * a, w) - value(h - step * a, w)) / (2 * step)
    slope_w = (value(h, w + step * c) - value(h, w - step * c)) / (2 * step)
    np.testing.assert_allclose([(d_h * a).sum(), (d_w * c).sum()], [slope_h, slope_w], rtol=1e-6)


def test_equal_to_the_naive_version():
    hidden, unembedding, tokens, mask, grads = batch(dirty=False)
    mask[:, 0] = False

    def naive(h, w):
        log_p = jax.nn.log_softmax(h[:, :-1] @ w, axis=-1)
        logps = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
        entropies = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        on = mask[:, 1:]
        return jnp.sum(grads[:, :, 1:] * jnp.where(on, jnp.stack([logps, entropies]), 0))

    def ours(h, w):
        return scalar(h, w, tokens, mask, grads, chunk_size=3)[0]

    args = hidden, unembedding
    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(ours, (0, 1)))(*args)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(naive, (0, 1)))(*args)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_shift_by_hand():
    # A predictor says 4 * onehot(w): w is next, and its log-prob stands where the next token is.
    said = jnp.array([[2, 0, 1, 1]])
    tokens = jnp.array([[0, 2, 0, 0]])
    out = next_token_logps(
        4.0 * jax.nn.one_hot(said, 3), jnp.eye(3), tokens, jnp.ones((1, 4), bool), with_entropy=True
    )
    total = np.log(np.exp(4) + 2)
    np.testing.assert_allclose(out.logps, [[0, 4 - total, 4 - total, -total]], rtol=1e-5)
    np.testing.assert_allclose(
        out.entropies, [[0, *[total - 4 * np.exp(4 - total)] * 3]], rtol=1e-5
    )
    assert out.is_argmax.tolist() == [[False, True, True, False]]
    assert next_token_logps(jnp.ones((1, 4, 3)), jnp.eye(3), tokens, said > 0).entropies is None


def test_ties_count_as_most_likely():
    logits = jnp.array([[[2.0, 2.0, 1.0]] * 4])
    tokens = jnp.array([[0, 0, 1, 2]])
    out = next_token_logps(logits, jnp.eye(3), tokens, jnp.ones((1, 4), bool))
    assert out.is_argmax.tolist() == [[False, True, True, False]]


def test_extreme_logits_and_rows_without_targets():
    hidden, unembedding, tokens, mask, grads = batch()
    expected = oracle(hidden * 1e6, unembedding, tokens, mask, 1.0, *grads)

    def loss(h, w):
        return scalar(h, w, tokens, mask, grads, chunk_size=4)

    (d_h, d_w), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden * 1e6, unembedding)
    np.testing.assert_allclose(out.logps, expected[0], rtol=1e-4, atol=4.0)
    for x in (out.logps, out.entropies, d_h, d_w):
        assert jnp.isfinite(x).all()
    nothing = jnp.zeros((B, T), bool)
    d_h, d_w = jax.grad(lambda h, w: scalar(h, w, tokens, nothing, grads)[0], (0, 1))(
        jnp.full((B, T, D), jnp.nan), unembedding
    )
    assert (d_h == 0).all() and (d_w == 0).all()


@pytest.mark.parametrize("tau", [1.0, 0.7])  # 0.7 is not a bfloat16
def test_bfloat16_is_summed_in_float32(tau):
    hidden, unembedding, tokens, mask, grads = batch(seed=1)
    h, w = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(unembedding, jnp.bfloat16)
    expected = oracle(h, w, tokens, mask, tau, *grads)

    def loss(h, w):
        return scalar(h, w, tokens, mask, grads, chunk_size=2, temperature=tau)

    (d_h, d_w), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(h, w)
    np.testing.assert_allclose(out.logps, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.entropies, expected[1], rtol=1e-5, atol=1e-5)
    assert d_h.dtype == d_w.dtype == jnp.bfloat16 and out.logps.dtype == jnp.float32
    np.testing.assert_allclose(np.float32(d_h), expected[3], rtol=0.03, atol=0.03)
    np.testing.assert_allclose(np.float32(d_w), expected[4], rtol=0.03, atol=0.06)


def test_gradient_of_a_bfloat16_unembedding_does_not_stall():
    # 1,024 equal terms: a bfloat16 sum would stop growing after about 256 of them.
    ones = jnp.ones((1, 1025, 1), jnp.bfloat16)
    tokens, mask = jnp.zeros((1, 1025), jnp.int32), jnp.ones((1, 1025), bool)

    def loss(w):
        return next_token_logps(ones, w, tokens, mask, chunk_size=1).logps.sum()

    grad = jax.jit(jax.grad(loss))(jnp.zeros((1, 2), jnp.bfloat16))
    assert grad.tolist() == [[512.0, -512.0]]


def test_temperature_is_traced():
    hidden, unembedding, tokens, mask, grads = batch()
    loss = jax.jit(lambda tau: scalar(hidden, unembedding, tokens, mask, grads, temperature=tau)[0])
    for tau in (0.5, 1.0, 2.0):
        logps, entropies, *_ = oracle(hidden, unembedding, tokens, mask, tau, *grads)
        expected = (grads[0] * logps).sum() + (grads[1] * entropies).sum()
        np.testing.assert_allclose(loss(tau), expected, rtol=1e-5)
    assert loss._cache_size() == 1
    assert jax.grad(loss)(0.5) == 0


def arrays(jaxpr):
    """Shapes of everything that is computed, at any depth."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jaxprs_in_params(equation.params):
            yield from arrays(inner)


@pytest.mark.parametrize(("time", "chunk_size", "chunk"), [(64, 4, 4), (4096, None, 341)])
def test_no_array_of_all_logits_exists(monkeypatch, time, chunk_size, chunk):
    dim, vocab = 5, 509
    # Fewer may be kept for the backward pass.
    monkeypatch.setattr(vocabulary, "MOST_KEPT", 3 * time * vocab - 1)
    hidden, unembedding, tokens, mask, grads = batch(0, (3, time), dim, vocab)

    def loss(h, w):
        return scalar(h, w, tokens, mask, grads, chunk_size=chunk_size)[0]

    grad = jax.grad(loss, (0, 1))
    shapes = set(arrays(jax.make_jaxpr(grad)(hidden, unembedding).jaxpr))
    with_vocab = {s for s in shapes if vocab in s}
    assert (3, chunk, vocab) in with_vocab
    assert max(int(np.prod(s)) for s in with_vocab) == 3 * chunk * vocab
    temporaries = jax.jit(grad).lower(hidden, unembedding).compile().memory_analysis()
    assert temporaries.temp_size_in_bytes < 0.5 * 3 * time * vocab * 4


@pytest.mark.parametrize(("most_kept", "passes"), [(0, 2), (vocabulary.MOST_KEPT, 1)])
def test_chunks_without_a_target_are_skipped(monkeypatch, most_kept, passes):
    seen = []
    product = vocabulary.logits
    monkeypatch.setattr(vocabulary, "MOST_KEPT", most_kept)

    def spy(hidden, unembedding):
        jax.debug.callback(lambda: seen.append(hidden.shape[1]))
        return product(hidden, unembedding)

    monkeypatch.setattr(vocabulary, "logits", spy)
    hidden, unembedding, tokens, _, grads = batch(dirty=False)
    jax.clear_caches()  # of traces without the spy
    late = np.zeros((B, T), bool)
    late[:, -3:] = True  # prompts of 10 tokens, completions of 3
    late[2, 5:7] = True  # and one row with 5 targets in two places

    def loss(h):
        return scalar(h, unembedding, tokens, late, grads, chunk_size=4)[0]

    jax.block_until_ready(jax.grad(loss)(hidden))
    jax.effects_barrier()
    jax.clear_caches()  # of traces with it
    assert seen == [4] * (2 * passes)  # 5 targets at most in a row: 2 chunks of 4


def test_calls_outside_jit_compile_once(monkeypatch):
    num_traces = 0
    product = vocabulary.logits

    def spy(*args):
        nonlocal num_traces
        num_traces += 1
        return product(*args)

    monkeypatch.setattr(vocabulary, "logits", spy)
    hidden, unembedding, tokens, mask, grads = batch(shape=(B, T + 1))
    seen = []
    for scale in (1.0, 2.0):
        grad = jax.grad(lambda h: scalar(h, unembedding, tokens, mask, grads)[0])
        grad(scale * hidden)
        seen.append(num_traces)
    assert seen[0] == seen[1] > 0


def test_the_same_on_eight_devices():
    devices = jax.devices()[:8]
    assert len(devices) == 8
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2, devices=devices)
    rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "tensor"))
    hidden, unembedding, tokens, mask, grads = batch()

    def loss(h, w, tokens, mask, g_logps, g_entropies):
        return scalar(h, w, tokens, mask, (g_logps, g_entropies), chunk_size=4)

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    args = hidden, unembedding, tokens, mask, *grads
    one = grad(*args)
    spread = [jax.device_put(x, columns if i == 1 else rows) for i, x in enumerate(args)]
    compiled = grad.lower(*spread).compile()
    many = compiled(*spread)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    d_hidden, d_unembedding = many[1]
    assert d_hidden.sharding.is_equivalent_to(rows, 3)
    assert d_unembedding.sharding.is_equivalent_to(columns, 2)
    # Neither the batch nor the vocabulary is ever gathered or moved: only sums are exchanged.
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert operation not in compiled.as_text()


def test_gradient_accumulation_by_scan():
    hidden, unembedding, tokens, mask, grads = batch()

    def loss(w, h, tokens, mask, grads):
        return scalar(h, w, tokens, mask, grads, chunk_size=4)[0]

    def accumulate(w, micro):
        def body(total, rows):
            return total + jax.grad(loss)(w, *rows), None

        return jax.lax.scan(body, jnp.zeros_like(w), micro)[0]

    whole = jax.jit(jax.grad(loss))(unembedding, hidden, tokens, mask, grads)
    micro = [x.reshape(4, 2, *x.shape[1:]) for x in (hidden, tokens, mask)]
    split = jax.jit(accumulate)(unembedding, (*micro, grads.reshape(2, 4, 2, T).swapaxes(0, 1)))
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


EVERYTHING = {
    "with_entropy": True,
    "with_log_normalizer": True,
    "with_mean_logp": True,
    "with_log_collision": True,
    "top_k": 3,
}
"""Asks for all statistics."""
OPTIONS = [{}, {"soft_cap": 2.0, "vocab_size": 15}]


def statistics_oracle(hidden, unembedding, tokens, mask, soft_cap=None, vocab_size=None):
    """Each statistic of the distribution that token t was drawn from, in the order of TokenLogps.

    Arguments of `np.exp` are small here: no care for overflow obscures the definitions.
    """
    h, w = np.asarray(hidden, np.float64), np.asarray(unembedding, np.float64)
    out = [np.zeros(mask.shape) for _ in range(6)]
    out += [np.zeros((*mask.shape, 3)), np.zeros((*mask.shape, 3), int)]
    for b, t in zip(*np.nonzero(mask[:, 1:]), strict=True):
        z, y = (h[b, t] @ w)[:vocab_size], tokens[b, t + 1]
        if soft_cap is not None:
            z = soft_cap * np.tanh(z / soft_cap)
        p = np.exp(z / TAU) / sum(np.exp(z / TAU))
        best = sorted(range(len(z)), key=lambda v: -p[v])[:3]
        terms = (
            np.log(p[y]),
            -sum(p * np.log(p)),
            y == best[0],
            np.log(sum(np.exp(z / TAU))),
            sum(np.log(p)) / len(p),
            np.log(sum(p**2)),
            np.log(p[best]),
            best,
        )
        for x, term in zip(out, terms, strict=True):
            x[b, t + 1] = term
    return out


def small(vocab_size=None, **options):
    """As `batch`, with tokens of the real vocabulary, and weights for each statistic in turn."""
    hidden, unembedding, tokens, mask, _ = batch(3, (3, 7), **options)
    limit = V if vocab_size is None else vocab_size
    tokens = np.where(mask & (tokens >= limit), tokens % limit, tokens).astype(np.int32)
    weights = np.random.default_rng(8).normal(size=(6, 3, 7))
    return hidden, unembedding, tokens, mask, weights


def weighted(results, weights):
    """[6]: each statistic that has a gradient, summed with weights."""
    floats = [x for i, x in enumerate(results) if i not in (2, 7)]
    return [(x.T * w.T).sum() for x, w in zip(floats, weights, strict=True)]


@pytest.mark.parametrize("options", OPTIONS)
def test_statistics_against_loops(options):
    hidden, unembedding, tokens, mask, _ = small(options.get("vocab_size"))
    out = next_token_logps(
        hidden, unembedding, tokens, mask, temperature=TAU, chunk_size=2, **EVERYTHING, **options
    )
    expected = statistics_oracle(hidden, unembedding, tokens, mask, **options)
    for name, x, y in zip(out._fields, out, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)
    assert out.top_ids.dtype == jnp.int32 and out.mean_logps.dtype == jnp.float32
    plain = next_token_logps(hidden, unembedding, tokens, mask, **options)
    assert [name for name, x in plain._asdict().items() if x is not None] == ["logps", "is_argmax"]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_statistics_against_finite_differences(options):
    """In float64, by hidden states and unembedding, along a random direction."""
    hidden, unembedding, tokens, mask, weights = small(options.get("vocab_size"), dirty=False)
    rng, step = np.random.default_rng(4), 1e-5
    args = [hidden.astype(np.float64), unembedding.astype(np.float64)]
    directions = [rng.normal(size=x.shape) for x in args]

    def oracle_at(distance):
        moved = [x + distance * d for x, d in zip(args, directions, strict=True)]
        return np.array(weighted(statistics_oracle(*moved, tokens, mask, **options), weights))

    def ours(h, w):
        out = next_token_logps(
            h, w, tokens, mask, temperature=TAU, chunk_size=3, **EVERYTHING, **options
        )
        return jnp.stack(weighted(out, weights))

    with jax.enable_x64(True):
        by_h, by_w = jax.jit(jax.jacrev(ours, (0, 1)))(*map(jnp.asarray, args))
        by_h, by_w = np.asarray(by_h), np.asarray(by_w)
    assert by_h.dtype == by_w.dtype == np.float64
    slopes = np.sum(by_h * directions[0], (1, 2, 3)) + np.sum(by_w * directions[1], (1, 2))
    np.testing.assert_allclose(slopes, (oracle_at(step) - oracle_at(-step)) / (2 * step), rtol=1e-7)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_statistics_equal_the_naive_version(options, is_tied):
    """By an unembedding of its own, or by the embedding that also makes the hidden states."""
    _, embedding, tokens, mask, weights = small(options.get("vocab_size"), dirty=False)
    table, mask = jnp.asarray(embedding.T), mask & (np.arange(7) > 0)
    mixed = np.random.default_rng(6).normal(size=(D, D)).astype(np.float32)

    def naive(hidden, w):
        z = (hidden[:, :-1] @ w)[..., : options.get("vocab_size", V)]
        if cap := options.get("soft_cap"):
            z = cap * jnp.tanh(z / cap)
        log_p, p = jax.nn.log_softmax(z / TAU), jax.nn.softmax(z / TAU)
        out = [
            jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0],
            -jnp.sum(p * log_p, axis=-1),
            None,
            jax.nn.logsumexp(z / TAU, axis=-1),
            jnp.mean(log_p, axis=-1),
            jnp.log(jnp.sum(p**2, axis=-1)),
            jax.lax.top_k(log_p, 3)[0],
            None,
        ]
        on = mask[:, 1:]
        out = [
            x if x is None else jnp.where(on if x.ndim == 2 else on[..., None], x, 0.0) for x in out
        ]
        return jnp.stack(weighted(out, weights[..., 1:]))

    def ours(hidden, w):
        out = next_token_logps(
            hidden, w, tokens, mask, temperature=TAU, chunk_size=3, **EVERYTHING, **options
        )
        return jnp.stack(weighted(out, weights))

    def gradients(of):
        def total(table, w):
            return of(jnp.tanh(table[tokens] @ mixed), table.T if is_tied else w)

        return jax.jit(jax.jacrev(total, (0, 1)))(table, jnp.asarray(embedding))

    for a, b in zip(gradients(ours), gradients(naive), strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())
    assert (gradients(ours)[1] == 0).all() == is_tied


def test_statistics_by_hand():
    """Two tokens of probability 3/4 and 1/4, and a third entry that is padding."""
    hidden, unembedding = jnp.ones((1, 2, 1)), jnp.array([[np.log(3.0), 0.0, 9.0]])
    tokens, on = jnp.array([[2, 1]]), jnp.ones((1, 2), bool)
    options = EVERYTHING | {"top_k": 2}
    out = next_token_logps(hidden, unembedding, tokens, on, vocab_size=2, **options)
    expected = {
        "logps": np.log(1 / 4),
        "entropies": -(3 / 4 * np.log(3 / 4) + 1 / 4 * np.log(1 / 4)),
        "is_argmax": False,
        "log_normalizers": np.log(3 + 1),
        "mean_logps": (np.log(3 / 4) + np.log(1 / 4)) / 2,
        "log_collisions": np.log(9 / 16 + 1 / 16),
        "top_logps": np.log([3 / 4, 1 / 4]),
        "top_ids": [0, 1],
    }
    for name, x in expected.items():
        np.testing.assert_allclose(getattr(out, name)[0, 1], x, rtol=1e-6, err_msg=name)
    # 2 tanh(9 / 2) = 1.9995..: the cap comes first, then the temperature.
    out = next_token_logps(
        hidden, unembedding, tokens, on, soft_cap=2.0, temperature=0.5, with_log_normalizer=True
    )
    capped = 2 * np.tanh(np.array([np.log(3), 0, 9]) / 2)
    np.testing.assert_allclose(
        out.log_normalizers[0, 1], np.log(sum(np.exp(capped / 0.5))), rtol=1e-6
    )


def test_padding_of_the_vocabulary_is_as_if_it_were_not_there():
    hidden, unembedding, tokens, mask, weights = small(15)
    tokens[1] = np.nan_to_num(np.roll(hidden[1] @ unembedding, 1, axis=0))[:, :15].argmax(axis=1)
    unembedding[:, 15:] = 1e3

    def ours(w, **options):
        out = next_token_logps(hidden, w, tokens, mask, **EVERYTHING, **options)
        return sum(weighted(out, weights)), out

    (_, padded), grad = jax.value_and_grad(ours, has_aux=True)(unembedding, vocab_size=15)
    (_, cut), expected = jax.value_and_grad(ours, has_aux=True)(unembedding[:, :15])
    for x, y in zip(padded, cut, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad[:, :15], expected, rtol=1e-5, atol=1e-5)
    assert (grad[:, 15:] == 0).all() and (padded.top_ids < 15).all()
    assert padded.is_argmax[1, 1:].all()


@pytest.mark.parametrize("options", [*OPTIONS, {"soft_cap": 30.0, "temperature": 0.1}])
def test_statistics_of_extreme_logits_are_finite(options):
    hidden, unembedding, tokens, mask, weights = small(options.get("vocab_size"))

    def loss(h, w):
        out = next_token_logps(h, w, tokens, mask, **EVERYTHING, **options)
        return sum(weighted(out, weights)), out

    for scale in (1e4, 1e8):
        grads, out = jax.grad(loss, (0, 1), has_aux=True)(scale * hidden, unembedding)
        for x in (*out, *grads):
            assert jnp.isfinite(x).all()


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("shape", [(4, 2), (1, 8)])
def test_statistics_on_eight_devices(shape, top_k):
    """Rows and vocabulary stay where they are; only top_k gathers, and no more than a chunk."""
    mesh = jax.make_mesh(shape, ("data", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:8])
    hidden, unembedding, tokens, mask, _ = batch(vocab=24)
    args = hidden, unembedding, np.where(mask, tokens % 21, tokens).astype(np.int32), mask
    spread = [
        jax.device_put(x, NamedSharding(mesh, P(None, "tensor") if i == 1 else P("data")))
        for i, x in enumerate(args)
    ]
    options = EVERYTHING | {"top_k": top_k, "vocab_size": 21, "soft_cap": 3.0, "chunk_size": 4}

    def loss(*args):
        out = next_token_logps(*args, **options)
        floats = [x for x in out if x is not None and x.dtype == jnp.float32]
        return sum(i * jnp.sum(x) for i, x in enumerate(floats, 1)), out

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    compiled = grad.lower(*spread).compile()
    for a, b in zip(jax.tree.leaves(compiled(*spread)), jax.tree.leaves(grad(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))
    text = compiled.as_text()
    gathered = set(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text))
    assert gathered <= ({f"{B // shape[0]},4,24", f"{B},4,24"} if top_k else set())
    assert "all-to-all" not in text and "collective-permute" not in text


def test_kept_logits_have_the_gradient_of_those_that_are_computed_again(monkeypatch):
    args = batch()

    def grad():
        jax.clear_caches()  # of traces with another limit
        out = jax.grad(lambda h, w: scalar(h, w, *args[2:], chunk_size=4)[0], (0, 1))(*args[:2])
        return jax.tree.leaves(out)

    kept = grad()
    monkeypatch.setattr(vocabulary, "MOST_KEPT", 0)
    again = grad()
    jax.clear_caches()
    for a, b in zip(kept, again, strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_peak_memory_follows_the_chunk(monkeypatch):
    monkeypatch.setattr(vocabulary, "MOST_KEPT", 0)

    def temporary(time, chunk_size):
        h, w = jnp.zeros((2, time, 4)), jnp.zeros((4, 1001))
        tokens, mask = jnp.zeros((2, time), jnp.int32), jnp.ones((2, time), bool)

        def loss(h, w):
            out = next_token_logps(h, w, tokens, mask, chunk_size=chunk_size, **EVERYTHING)
            return sum(jnp.sum(x) for x in out if x.dtype == jnp.float32)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(h, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (2 * 1001 * 4)

    short, long, wide = temporary(256, 32), temporary(1024, 32), temporary(1024, 64)
    # In rows of logits for each row of the batch: 768 time steps more cost less than 32 of them.
    assert long - short < 32 and 2 * 32 < wide - long < 8 * 32


def test_errors():
    h, w, tokens = jnp.ones((2, 4, 3)), jnp.ones((3, 5)), jnp.zeros((2, 4), jnp.int32)
    on = tokens == 0
    for tau in (0, -1.0, float("nan"), np.float32(0), np.array(0.0), np.float64("nan")):
        with pytest.raises(ValueError, match=r"temperature=.*expected > 0"):
            next_token_logps(h, w, tokens, on, temperature=tau)
    for tau in (np.ones(2), jnp.ones((1, 1))):
        with pytest.raises(AssertionError):
            next_token_logps(h, w, tokens, on, temperature=tau)
    for empty in (slice(0), (slice(None), slice(0))):
        with pytest.raises(ValueError, match="at least one row and one time step"):
            next_token_logps(h[empty], w, tokens[empty], on[empty])
    with pytest.raises(ValueError, match="chunk_size=0"):
        next_token_logps(h, w, tokens, on, chunk_size=0)
    for name, wrong in (
        ("soft_cap", (0.0, -1.0, float("nan"))),
        ("vocab_size", (0, 6)),
        ("top_k", (-1, 6)),
    ):
        for value in wrong:
            with pytest.raises(ValueError, match=f"{name}={value}: expected"):
                next_token_logps(h, w, tokens, on, **{name: value})
    with pytest.raises(ValueError, match="top_k=5: expected 0 to 4"):
        next_token_logps(h, w, tokens, on, vocab_size=4, top_k=5)
    for args in (
        (h, w.T, tokens, on),
        (h, w, tokens[:, :3], on),
        (h, w, tokens, tokens),
        (h, w, on, on),
        (h[0], w, tokens, on),
        (h.astype(jnp.float16), w, tokens, on),
        (h, w.astype(jnp.float16), tokens, on),
        (h.astype(int), w, tokens, on),
        (h, w, tokens.astype(jnp.int16), on),
    ):
        with pytest.raises(AssertionError):
            next_token_logps(*args)
