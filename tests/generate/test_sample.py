"""Sampling against NumPy in float64, and the frequencies that it should have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.generate.sample import sample_token
from alignjax.generate.truncate import Truncation, threshold


def cut(top_k=0, top_p=1.0, min_p=0.0):
    return Truncation(jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))


def support(logits, *how):
    return np.asarray(jax.jit(lambda x: threshold(x, cut(*how)).keeps(x))(jnp.array(logits)))


def oracle_support(logits, top_k, top_p, min_p=0.0):
    """From the definitions, one row at a time: sort, keep k, renormalise, keep the smallest set."""
    keep = np.zeros(logits.shape, bool)
    for row, values in enumerate(np.asarray(logits, np.float64)):
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        ranked = ranked[: top_k or None]
        weights = np.exp(values[ranked] - values.max())
        weights /= weights.sum()
        mass = 0.0
        for token, weight in zip(ranked, weights, strict=True):
            keep[row, token] = True
            mass += weight
            if mass >= top_p:
                break
        keep[row] &= np.exp(values - values.max()) >= min_p
    return keep


@pytest.mark.parametrize(
    "how",
    # 1e-50 is 0 in float32: the most likely token is kept even so.
    [(0, 1.0), (3, 1.0), (0, 0.7), (5, 0.5), (1, 1.0), (0, 1e-6), (0, 1e-50), (0, 1.0, 0.1),
     (6, 0.9, 0.2), (0, 0.5, 0.01), (17, 0.999, 1.0), (16, 1.0)],
)  # fmt: skip
@pytest.mark.parametrize("is_tied", [False, True])
def test_support_is_that_of_the_definitions_by_sorting(how, is_tied):
    """With ties, too: of equal logits, zeros of both signs among them, the lower id goes first."""
    logits = np.random.default_rng(0).normal(size=(40, 17)).astype(np.float32) * 2
    if is_tied:
        logits = np.round(logits)
        logits[:, 3], logits[:, 5:8], logits[0] = -np.inf, [0.0, -0.0, 0.0], 1.0
        how = (how[0], how[1] if how[1] < 1e-3 else how[1] - 1e-3, *how[2:])
    np.testing.assert_array_equal(support(logits, *how), oracle_support(logits, *how))


def test_support_in_a_large_vocabulary():
    logits = np.random.default_rng(1).normal(size=(3, 5000)).astype(np.float32) * 3
    np.testing.assert_array_equal(
        support(logits, 700, 0.9, 1e-3), oracle_support(logits, 700, 0.9, 1e-3)
    )


def test_a_set_that_reaches_top_p_exactly_is_complete():
    logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]], jnp.float32))
    keep = support(logits, 0, 0.5)
    np.testing.assert_array_equal(keep, [[False, True, False]])


def test_frequencies_and_log_probs_are_those_of_the_tempered_distribution():
    logits = np.array([2.0, 0.5, -1.0, 0.0, -np.inf], np.float32)
    temperature, count = 0.7, 200_000
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled) / np.exp(scaled).sum()
    tokens, logps = sample_token(
        jnp.broadcast_to(logits, (count, 5)), jax.random.uniform(jax.random.PRNGKey(0), (count,)),
        jnp.float32(temperature), cut(),
    )  # fmt: skip
    frequency = np.bincount(tokens, minlength=5) / count
    assert np.all(np.abs(frequency - probs) <= 4 * np.sqrt(probs * (1 - probs) / count))
    np.testing.assert_allclose(logps, np.log(probs[np.asarray(tokens)]), rtol=1e-5)


def test_log_probs_are_renormalised_over_the_support():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]], jnp.float32))
    tokens, logps = sample_token(logits, jnp.array([0.99]), jnp.float32(1.0), cut(2))
    assert tokens[0] == 1
    np.testing.assert_allclose(logps, np.log(0.3 / 0.8), rtol=1e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.5)])
def test_temperature_zero_takes_the_most_likely_and_reports_temperature_one(top_k, top_p):
    logits = jnp.array([[0.0, 3.0, 1.0]], jnp.float32)
    tokens, logps = sample_token(logits, jnp.array([0.999]), jnp.float32(0.0), cut(top_k, top_p))
    expected = 3.0 - np.log(np.exp(0.0) + np.exp(3.0) + np.exp(1.0))
    assert tokens[0] == 1
    np.testing.assert_allclose(logps, expected, rtol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])
def test_the_extremes_of_the_uniform_never_leave_the_support(uniform):
    # A float32 cumulative sum over a large vocabulary ends a little off 1.
    logits = np.full((1, 50_000), 0.0, np.float32)
    logits[0, :7] = logits[0, -9:] = -np.inf
    tokens, logps = sample_token(jnp.array(logits), jnp.array([uniform]), jnp.float32(1.0), cut())
    assert 7 <= tokens[0] < 50_000 - 9
    assert np.isfinite(logps[0])


@pytest.mark.parametrize("seed", [0, 7])  # Between tokens one sum falls, one rises.
def test_no_uniform_between_two_tokens_leaves_the_top_k(seed):
    """XLA's sum is not flat where the terms are 0: 0.71144724 once gave a token of logp -inf."""
    vocab, top_k = 32_768, 20
    logits = (np.random.default_rng(seed).normal(size=vocab) * 2).astype(np.float32)
    kept = np.sort(np.argsort(-logits)[:top_k])
    weights = np.exp(logits[kept].astype(np.float64))
    cdf = weights.cumsum() / weights.sum()
    # Every value that jax.random.uniform can have near the places where the token changes.
    steps = np.round(cdf[:-1] * 2**23)[:, None] + np.arange(-4, 5)
    uniform = (steps.ravel() / 2**23).astype(np.float32)
    tokens, logps = jax.jit(sample_token)(
        jnp.broadcast_to(logits, (len(uniform), vocab)), jnp.array(uniform),
        jnp.float32(1.0), cut(top_k),
    )  # fmt: skip
    assert np.isfinite(logps).all()
    place = np.searchsorted(kept, tokens)
    np.testing.assert_array_equal(kept[place], tokens)
    assert (np.r_[0, cdf][place] - 2e-6 <= uniform).all() and (uniform <= cdf[place] + 2e-6).all()
