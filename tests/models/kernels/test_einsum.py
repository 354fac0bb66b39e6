"""What a query sees, by hand; one query has the bits that it has among many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.kernels import attend, visible
from alignjax.models.kernels.einsum import capped
from tests.models.kernels.oracle import draw


@pytest.mark.parametrize("window", [None, 2**30])
def test_visible_by_hand(window):
    segments = jnp.array([[0, 1, 1, 2, 2, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]
    found = visible(segments, segments, window=window)[0]
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_visible_in_a_cache_by_hand():
    """Two queries in slots 3 and 4 of a cache of 6; the last slot is not written yet."""
    queries, cached = jnp.array([[1, 1]]), jnp.array([[0, 1, 1, 1, 1, 0]])
    expected = {
        None: [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]],
        1: [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]],
        3: [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]],
    }
    for window, rows in expected.items():
        found = visible(queries, cached, 3, window)[0]
        np.testing.assert_array_equal(found, np.array(rows, bool))


def test_visible_branches_by_hand():
    """A trunk of 2, branches of 1 and 2, then a trunk alone; by positions, not by slots, near."""
    segments = jnp.array([[1, 1, 1, 1, 1, 2]])
    branches, positions = jnp.array([[0, 0, 1, 2, 2, 0]]), jnp.array([[0, 1, 2, 2, 3, 0]])
    expected = {
        None: [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
        2: [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 0, 1, 0, 0],
            [0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ],
    }
    for window, rows in expected.items():
        found = visible(segments, segments, window=window, branches=branches, positions=positions)[
            0
        ]
        np.testing.assert_array_equal(found, np.array(rows, bool))


def test_the_cap_by_hand():
    scores = jnp.array([-1000.0, 0.0, 2 * np.arctanh(0.5)])
    np.testing.assert_allclose(capped(scores, 2.0), [-2.0, 0.0, 1.0], atol=1e-6)
    assert capped(scores, None) is scores


@pytest.mark.usefixtures("compiled_as_for_users")
@pytest.mark.parametrize("options", [{}, {"windows": (5,), "soft_cap": 2.0}])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_query_has_the_bits_that_it_has_among_many(dtype, kv_heads, options):
    """What keeps the log-probs of the sampler those of the trainer, with many rows."""
    inputs = draw(np.ones((64, 64), int), heads=4, kv_heads=kv_heads, head_dim=32)
    inputs = inputs.cast(dtype)

    @jax.jit
    def run(q, k, v, first_slot):
        return attend(
            q, k, v, jnp.ones(q.shape[:2], jnp.int32), inputs.key_segments,
            first_slot=first_slot, scale=0.2, implementation="einsum", **options,
        )  # fmt: skip

    whole = run(inputs.q, *inputs[1:3], 0)
    for slot in (0, 7, 63):
        one = run(inputs.q[:, slot : slot + 1], *inputs[1:3], slot)
        np.testing.assert_array_equal(one, whole[:, [slot]])
