"""Distillation against loops in float64, and what must not be: all logits, a teacher pulled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import losses
from alignjax.losses import vocabulary
from tests.losses.test_logprob import arrays

B, T, D, D_T, V, K, TAU = 3, 7, 5, 4, 16, 3, 0.7
FULL = [losses.forward_kl, losses.reverse_kl, losses.jsd]
CASES = [
    (losses.forward_kl, {}),
    (losses.reverse_kl, {}),
    (losses.reverse_kl, {"soft_cap": 2.0, "teacher_soft_cap": 3.0, "vocab_size": 13}),
    (losses.jsd, {}),
    (losses.jsd, {"beta": 0.1, "vocab_size": 13}),
    (losses.top_k_forward_kl, {}),
    (losses.top_k_forward_kl, {"soft_cap": 2.0, "vocab_size": 13}),
]


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def probabilities(hidden, unembedding, soft_cap, vocab_size, tau=TAU):
    z = (np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64))[:vocab_size]
    z = z if soft_cap is None else soft_cap * np.tanh(z / soft_cap)
    return np.exp(z / tau) / sum(np.exp(z / tau))


def divergence(function, student, teacher, beta=0.5):
    """The definition, of two distributions, or of one and a pair: ids and their log-probs."""
    if function is losses.top_k_forward_kl:
        ids, log_p = np.asarray(teacher[0]), np.asarray(teacher[1], np.float64)
        p = np.exp(log_p)
        q = student[ids]
        return kl([*p, 1 - sum(p)], [*q, 1 - sum(q)])
    if function is losses.forward_kl:
        return kl(teacher, student)
    if function is losses.reverse_kl:
        return kl(student, teacher)
    mixed = [beta * t + (1 - beta) * s for t, s in zip(teacher, student, strict=True)]
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def oracle(
    function, h, w, a, b, mask, soft_cap=None, teacher_soft_cap=None, vocab_size=None, **options
):
    """Token by token; a, b are what each function takes of the teacher."""
    out = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask[:, 1:]), strict=True):
        student = probabilities(h[i, t], w, soft_cap, vocab_size)
        if function is losses.top_k_forward_kl:
            teacher = a[i, t + 1], b[i, t + 1]
        else:
            teacher = probabilities(a[i, t], b, teacher_soft_cap, vocab_size)
        out[i, t + 1] = divergence(function, student, teacher, **options)
    return out


def drawn(function, seed=0, dirty=True, shape=(B, T)):
    """Student, teacher and a mask; dirt on all that must not matter."""
    rng = np.random.default_rng(seed)
    h, a = rng.normal(size=(*shape, D)), rng.normal(size=(*shape, D_T))
    w, b = rng.normal(size=(D, V)), rng.normal(size=(D_T, V))
    mask = rng.random(shape) < 0.6
    mask[0], mask[1] = True, False
    on = mask & (np.arange(shape[1]) > 0)
    if function is losses.top_k_forward_kl:
        p = rng.dirichlet(np.ones(13), shape)
        a = np.argsort(-p, axis=2)[..., :K].astype(np.int32)
        b = np.log(np.take_along_axis(p, a, axis=2))
        if dirty:
            a[~on], b[~on] = 10**6, np.nan
    elif dirty:
        a[~np.roll(on, -1, axis=1)] = np.inf
    if dirty:
        h[~np.roll(on, -1, axis=1)] = np.nan
    return h, w, a, b, mask


def cast(args, dtype):
    return [jnp.asarray(x, dtype if x.dtype.kind == "f" else x.dtype) for x in args]


@pytest.mark.parametrize(("function", "options"), CASES)
def test_values_against_loops(function, options):
    args = drawn(function)
    expected = oracle(function, *args, **options)
    out = function(*cast(args, jnp.float32), temperature=TAU, chunk_size=4, **options)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-6)
    off = ~args[-1]
    off[:, 0] = True
    assert (np.asarray(out)[off] == 0).all() and (np.asarray(out)[~off] > 0).all()


@pytest.mark.parametrize(("function", "options"), CASES)
def test_gradients_against_finite_differences(function, options):
    """In float64, along a random direction of the student's hidden states and unembedding."""
    h, w, a, b, mask = drawn(function, 1)
    rng, step = np.random.default_rng(2), 1e-5
    weights = rng.normal(size=mask.shape)
    by_h, by_w = rng.normal(size=h.shape), rng.normal(size=w.shape)

    def slope(along_h, along_w):
        def at(x):
            out = oracle(function, h + x * along_h, w + x * along_w, a, b, mask, **options)
            return (out * weights).sum()

        return (at(step) - at(-step)) / (2 * step)

    def loss(h, w, a, b, mask):
        return jnp.sum(
            function(h, w, a, b, mask, temperature=TAU, chunk_size=2, **options) * weights
        )

    floats = (0, 1, 3) if function is losses.top_k_forward_kl else (0, 1, 2, 3)
    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(loss, floats))(*cast((h, w, a, b, mask), jnp.float64))
        d_h, d_w, *d_teacher = map(np.asarray, grads)
    assert d_h.dtype == d_w.dtype == np.float64
    assert all((x == 0).all() for x in d_teacher), "a teacher carries no gradient"
    np.testing.assert_allclose((d_h * by_h).sum(), slope(by_h, 0), rtol=1e-6)
    np.testing.assert_allclose((d_w * by_w).sum(), slope(0, by_w), rtol=1e-6)
    predicts = np.roll(mask & (np.arange(T) > 0), -1, axis=1)
    assert (d_h[~predicts] == 0).all()


def two(p):
    """Hidden states and an unembedding that give the second of two tokens probability p, 1 - p."""
    return jnp.ones((1, 2, 1)), jnp.log(jnp.array([[p, 1 - p]]))


def test_by_hand():
    """A vocabulary of two: the teacher says 3/4, 1/4, the student 1/2, 1/2."""
    on = jnp.ones((1, 2), bool)
    forward = 3 / 4 * np.log((3 / 4) / (1 / 2)) + 1 / 4 * np.log((1 / 4) / (1 / 2))
    reverse = 1 / 2 * np.log((1 / 2) / (3 / 4)) + 1 / 2 * np.log((1 / 2) / (1 / 4))
    # beta = 1/4: m = 1/4 (3/4, 1/4) + 3/4 (1/2, 1/2) = (9/16, 7/16).
    of_teacher = 3 / 4 * np.log((3 / 4) / (9 / 16)) + 1 / 4 * np.log((1 / 4) / (7 / 16))
    of_student = 1 / 2 * np.log((1 / 2) / (9 / 16)) + 1 / 2 * np.log((1 / 2) / (7 / 16))
    args = *two(1 / 2), *two(3 / 4), on
    np.testing.assert_allclose(losses.forward_kl(*args), [[0, forward]], rtol=1e-5)
    np.testing.assert_allclose(losses.reverse_kl(*args), [[0, reverse]], rtol=1e-5)
    np.testing.assert_allclose(
        losses.jsd(*args, beta=0.25), [[0, 1 / 4 * of_teacher + 3 / 4 * of_student]], rtol=1e-5
    )
    ids, logps = jnp.zeros((1, 2, 1), jnp.int32), jnp.full((1, 2, 1), jnp.log(3 / 4))
    np.testing.assert_allclose(
        losses.top_k_forward_kl(*two(1 / 2), ids, logps, on), [[0, forward]], rtol=1e-5
    )
    # Temperature 1/2 squares: 9/10, 1/10 against 1/2, 1/2. No factor of its square.
    cold = 9 / 10 * np.log(9 / 5) + 1 / 10 * np.log(1 / 5)
    np.testing.assert_allclose(losses.forward_kl(*args, temperature=0.5), [[0, cold]], rtol=1e-5)


@pytest.mark.parametrize("function", FULL)
def test_a_student_that_is_its_teacher(function):
    h, w, _, _, mask = cast(drawn(function), jnp.float32)
    value, grads = jax.value_and_grad(
        lambda h_s, w_s: jnp.sum(jnp.abs(function(h_s, w_s, h, w, mask))), (0, 1)
    )(h, w)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    for grad in grads:
        np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_limits_of_jsd_and_its_symmetry():
    h, w, a, b, mask = drawn(None)
    with jax.enable_x64(True):
        args = cast((h, w, a, b, mask), jnp.float64)
        swapped = cast((a, b, h, w, mask), jnp.float64)
        small = 1e-6
        for beta, share, kl_of in (
            (small, small, losses.forward_kl),
            (1 - small, small, losses.reverse_kl),
        ):
            np.testing.assert_allclose(
                losses.jsd(*args, beta=beta) / share, kl_of(*args), rtol=1e-3
            )
        np.testing.assert_allclose(
            losses.jsd(*args, beta=0.3), losses.jsd(*swapped, beta=0.7), rtol=1e-10
        )
        np.testing.assert_allclose(losses.forward_kl(*args), losses.reverse_kl(*swapped))


def full_and_top(num, seed=3):
    """forward_kl of a teacher's whole distribution, and of its `num` most likely tokens."""
    h, w, a, b, mask = cast(drawn(None, seed), jnp.float32)
    tokens = jnp.zeros(mask.shape, jnp.int32)
    top = losses.next_token_logps(a, b, tokens, mask, temperature=TAU, top_k=num)

    def by_top(h, w):
        return losses.top_k_forward_kl(h, w, top.top_ids, top.top_logps, mask, temperature=TAU)

    def by_all(h, w):
        return losses.forward_kl(h, w, a, b, mask, temperature=TAU)

    return by_all, by_top, h, w


def test_the_rest_of_one_token_is_no_loss():
    by_all, by_top, h, w = full_and_top(V - 1)
    np.testing.assert_allclose(by_top(h, w), by_all(h, w), rtol=1e-5, atol=1e-6)
    for x, y in zip(
        jax.grad(lambda *args: by_top(*args).sum(), (0, 1))(h, w),
        jax.grad(lambda *args: by_all(*args).sum(), (0, 1))(h, w),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_more_of_the_top_is_more_of_the_divergence():
    by_all, by_one, *student = full_and_top(1)
    _, by_nine, *_ = full_and_top(9)
    one, nine, everything = (of(*student) for of in (by_one, by_nine, by_all))
    for less, more in ((one, nine), (nine, everything)):
        assert (less <= more + 1e-6).all() and (less < more - 1e-4).any()


def test_all_of_the_teachers_mass_in_the_top():
    """Then the rest has no part in it, whatever the student gives it; nor does rounding past 1."""
    h, w, _, _, mask = cast(drawn(None), jnp.float32)
    ids = jnp.broadcast_to(jnp.array([2, 5]), (B, T, 2)).astype(jnp.int32)
    p = np.array([0.25, 0.75])
    for excess in (0.0, 1e-6):
        logps = jnp.broadcast_to(jnp.log(jnp.asarray(p)) + excess, (B, T, 2))
        out = losses.top_k_forward_kl(h, w, ids, logps, mask)
        for i, t in zip(*np.nonzero(mask[:, 1:]), strict=True):
            q = probabilities(h[i, t], w, None, None, tau=1.0)[[2, 5]]
            np.testing.assert_allclose(out[i, t + 1], kl(p, q), rtol=1e-4)


def test_a_student_that_leaves_almost_nothing_to_the_rest():
    """1 - sum q is 0 in float32, but the pull towards the teacher's rest must be whole."""
    unembedding = jnp.array([[60.0, 0.0, 0.0]])
    ids, logps = jnp.zeros((1, 2, 1), jnp.int32), jnp.full((1, 2, 1), jnp.log(0.5))
    on = jnp.ones((1, 2), bool)

    def loss(w):
        return losses.top_k_forward_kl(jnp.ones((1, 2, 1)), w, ids, logps, on).sum()

    value, grad = jax.value_and_grad(loss)(unembedding)
    # 1/2 log(1/2) + 1/2 (log(1/2) - log(2 e^-60)); of the gradient the rest's half is 1/4 each.
    np.testing.assert_allclose(value, np.log(1 / 2) + (60 - np.log(2)) / 2, rtol=1e-5)
    np.testing.assert_allclose(grad, [[0.5, -0.25, -0.25]], rtol=1e-5)


def test_sampled_estimates_have_the_exact_reverse_kl_as_their_mean():
    """By enumeration: k1 of each token, weighted with the policy's probability of it."""
    h, w, a, b, mask = cast(drawn(None, dirty=False), jnp.float32)
    mean = np.zeros(mask.shape)
    for v in range(V):
        tokens = jnp.full(mask.shape, v, jnp.int32)
        policy = losses.next_token_logps(h, w, tokens, mask, temperature=TAU).logps
        ref = losses.next_token_logps(a, b, tokens, mask, temperature=TAU).logps
        mean += np.where(mask, np.exp(policy) * losses.k1(policy, ref, mask), 0)
    exact = losses.reverse_kl(h, w, a, b, mask, temperature=TAU)
    np.testing.assert_allclose(exact[:, 1:], mean[:, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [*FULL, losses.top_k_forward_kl])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_are_finite(function, scale):
    h, w, a, b, mask = cast(drawn(function), jnp.float32)
    if function is losses.top_k_forward_kl:
        b = jnp.full_like(b, -1e4).at[..., 0].set(0.0)
    else:
        a = scale * a
    value, grads = jax.value_and_grad(lambda h, w: function(h, w, a, b, mask).sum(), (0, 1))(
        1e4 * h, w
    )
    assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in grads)


def test_bfloat16_teachers_and_students():
    h, w, a, b, mask = drawn(None)
    args = [*cast((h, w, a, b), jnp.bfloat16), jnp.asarray(mask)]
    expected = oracle(losses.forward_kl, *(np.asarray(x, np.float64) for x in args[:4]), mask)
    out = losses.forward_kl(*args, temperature=TAU)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [*FULL, losses.top_k_forward_kl])
def test_no_array_of_all_logits_exists(monkeypatch, function):
    args = cast(drawn(function, shape=(B, 66)), jnp.float32)
    monkeypatch.setattr(vocabulary, "MOST_KEPT", B * 66 * V - 1)

    def loss(h, w, *rest):
        return function(h, w, *rest, chunk_size=4).sum()

    grad = jax.grad(loss, (0, 1))
    shapes = {s for s in arrays(jax.make_jaxpr(grad)(*args).jaxpr) if V in s}
    assert (B, 4, V) in shapes
    assert max(int(np.prod(s)) for s in shapes) == B * 4 * V


@pytest.mark.parametrize("shape", [(4, 2), (1, 8)])
@pytest.mark.parametrize("function", [losses.jsd, losses.top_k_forward_kl])
def test_the_same_on_eight_devices(function, shape):
    """Both unembeddings spread over the vocabulary: neither they nor logits are gathered."""
    mesh = jax.make_mesh(shape, ("data", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:8])
    args = cast(drawn(function, shape=(8, T)), jnp.float32)
    spread = [
        jax.device_put(
            x,
            NamedSharding(
                mesh, P(None, "tensor") if x.ndim == 2 and x.shape[1] == V else P("data")
            ),
        )
        for x in args
    ]

    def loss(*args):
        out = function(*args, chunk_size=4)
        return (out * jnp.arange(out.size).reshape(out.shape)).sum(), out

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    compiled = grad.lower(*spread).compile()
    for a, b in zip(jax.tree.leaves(compiled(*spread)), jax.tree.leaves(grad(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))
    moved = re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())
    assert not moved


def test_calls_outside_jit_compile_once():
    args = cast(drawn(losses.jsd), jnp.float32)
    sizes = []
    for beta in (0.3, 0.6):
        losses.jsd(*args, beta=beta, temperature=beta)
        sizes.append(losses.vocabulary._compiled._cache_size())
    assert sizes[0] == sizes[1]


def test_errors():
    h, w, a, b, mask = cast(drawn(None), jnp.float32)
    for beta in (0.0, 1.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=f"beta={beta}: expected 0 < beta < 1"):
            losses.jsd(h, w, a, b, mask, beta=beta)
    with pytest.raises(ValueError, match="student's vocabulary has 16 entries, the teacher's 15"):
        losses.forward_kl(h, w, a, b[:, :-1], mask)
    for name in ("soft_cap", "teacher_soft_cap"):
        with pytest.raises(ValueError, match="soft_cap=0"):
            losses.reverse_kl(h, w, a, b, mask, **{name: 0})
    with pytest.raises(ValueError, match="temperature=0"):
        losses.forward_kl(h, w, a, b, mask, temperature=0)
    for wrong in ((a[0], b), (a, b.T), (a[:, 1:], b), (a.astype(int), b), (a, b.astype(int))):
        with pytest.raises(AssertionError):
            losses.forward_kl(h, w, *wrong, mask)
    ids = jnp.zeros((B, T, V), jnp.int32)
    logps = jnp.zeros(ids.shape)
    for num, vocab_size in ((0, None), (V, None), (3, 3)):
        with pytest.raises(ValueError, match=r"teacher_ids is .*: expected 1 to"):
            losses.top_k_forward_kl(
                h, w, ids[..., :num], logps[..., :num], mask, vocab_size=vocab_size
            )
    ids, logps = ids[..., :K], logps[..., :K]
    for wrong in ((ids, logps[..., :2]), (logps, logps), (ids, ids), (ids[:, 1:], logps[:, 1:])):
        with pytest.raises(AssertionError):
            losses.top_k_forward_kl(h, w, *wrong, mask)
