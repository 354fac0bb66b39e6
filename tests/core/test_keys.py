"""Names and numbers folded into a key: every path has a key of its own, the same in every run."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.keys import named_key


def test_by_hand():
    key = jax.random.PRNGKey(3)
    # CRC-32 of "123456789" by its specification's check value: a hash that every process shares.
    assert zlib.crc32(b"123456789") == 0xCBF43926
    expected = jax.random.fold_in(jax.random.fold_in(key, 0xCBF43926), 7)
    np.testing.assert_array_equal(named_key(key, "123456789", 7), expected)
    np.testing.assert_array_equal(named_key(key), key)


def test_every_path_has_a_key_of_its_own():
    key = jax.random.PRNGKey(0)
    paths = [("eval", 1), ("data", 1), ("eval", 2), (1, "eval"), ("eval",), (1,), ("eval", 1, 0)]
    keys = {tuple(np.asarray(named_key(key, *path)).tolist()) for path in paths}
    assert len(keys) == len(paths)


def test_numbers_may_be_traced():
    key = jax.random.PRNGKey(0)
    traced = jax.jit(lambda step: named_key(key, "sample", step))(jnp.int32(5))
    np.testing.assert_array_equal(traced, named_key(key, "sample", 5))
