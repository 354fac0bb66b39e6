"""The chunk engine with terms of a test's own: any tree of results, and statics by value."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.losses import vocabulary

B, T, D, V = 2, 9, 3, 7


@dataclass(frozen=True)
class Terms:
    power: int

    def __call__(self, z, weights, scale):
        sums = {"by_power": jnp.sum(scale * z**self.power, axis=-1) * weights["a"]}
        return sums, jnp.argmin(z, axis=-1), z[..., :2]


def drawn():
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    mask = rng.random((B, T)) < 0.6
    weights = {"a": np.where(mask, rng.normal(size=(B, T)), np.nan)}
    return jax.tree.map(jnp.asarray, (hidden, unembedding, weights, 0.5, mask))


def of_everything(terms, hidden, unembedding, inputs, scale, mask):
    """The same from all logits at once."""
    z = jnp.einsum("btd,dv->btv", jnp.roll(hidden, 1, axis=1), unembedding)
    on = mask & (jnp.arange(T) > 0)
    out = terms(z, jax.tree.map(lambda x: jnp.where(on, x, 0), inputs), scale)
    return jax.tree.map(lambda x: jnp.where(on[..., None] if x.ndim == 3 else on, x, 0), out)


def test_any_tree_of_results_and_its_gradient():
    hidden, unembedding, *rest = drawn()

    def total(of, h, w):
        out = of(h, w)
        return jnp.sum(out[0]["by_power"]) + jnp.sum(out[2] ** 2), out

    def chunked(h, w):
        return vocabulary.by_token(Terms(3), h, w, *rest, chunk_size=2)

    def whole(h, w):
        return of_everything(Terms(3), h, w, *rest)

    found, expected = (
        jax.grad(lambda h, w, of=of: total(of, h, w), (0, 1), has_aux=True)(hidden, unembedding)
        for of in (chunked, whole)
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_terms_that_are_equal_compile_once():
    for power, num_new in ((2, 1), (2, 0), (4, 1)):
        before = vocabulary._compiled._cache_size()
        vocabulary.by_token(Terms(power), *drawn(), chunk_size=3)
        assert vocabulary._compiled._cache_size() - before == num_new


def test_default_chunk_size():
    assert vocabulary.default_chunk_size(1) == vocabulary.ROWS_PER_CHUNK == 1024
    assert [vocabulary.default_chunk_size(n) for n in (3, 128, 4096)] == [341, 8, 8]
