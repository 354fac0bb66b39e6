"""Products of few queries with a cache, by the platform that they are compiled for."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.models.kernels import decode

QUERIES = jax.ShapeDtypeStruct((8, 2, 4, 16), jnp.bfloat16)
KEYS = jax.ShapeDtypeStruct((8, 2, 16, 32), jnp.bfloat16)


def lowered(platform):
    traced = jax.jit(decode._product).trace(QUERIES, KEYS)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_tpu_multiplies_matrices_and_writes_no_cache_out_as_float32():
    text = lowered("tpu")
    assert "dot_general" in text
    assert not re.search(r"convert.*8x2x16x32xbf16.*->.*8x2x16x32xf32", text)
    assert "dot_general" not in lowered("cpu")


def test_both_give_the_same():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in (QUERIES, KEYS))
    wanted = np.einsum("xkmi,xkij->xkmj", *(np.asarray(x, np.float64) for x in (a, b)))
    np.testing.assert_allclose(decode._product(a, b), wanted, rtol=1e-5, atol=1e-5)
    several = jnp.concatenate([a, a], axis=2)  # Eight queries: a product of matrices anywhere.
    np.testing.assert_allclose(
        decode._product(several, b), np.concatenate([wanted, wanted], 2), rtol=1e-5, atol=1e-5
    )
