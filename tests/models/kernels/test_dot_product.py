"""What JAX's own attention is asked for; its numbers are in test_dispatch.py."""

import jax
import numpy as np
import pytest

from alignjax.models.kernels import attend
from tests.models.kernels.oracle import draw


@pytest.mark.parametrize(("time", "first_slot", "is_causal"), [(8, 0, True), (4, 4, False)])
def test_cudnn_gets_the_mask_and_is_told_what_is_causal(monkeypatch, time, first_slot, is_causal):
    """No GPU is needed to see that the kernel gets [B, T, heads, head_dim] and all of the mask."""
    asked = {}

    def fake(q, k, v, **options):
        asked.update(options, shapes=(q.shape, k.shape, v.shape))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    inputs = draw([[0, 1, 1, 1, 2, 2, 2, 2]], time=time)
    attend(*inputs, scale=0.3, first_slot=first_slot, windows=(3,), implementation="cudnn")
    assert asked["shapes"] == ((1, time, 6, 8), (1, 8, 3, 8), (1, 8, 3, 8))
    assert (asked["scale"], asked["is_causal"]) == (0.3, is_causal)
    assert asked["implementation"] == "cudnn"
    seen = [[4], [4, 5], [4, 5, 6], [5, 6, 7]]
    found = [np.flatnonzero(row).tolist() for row in asked["mask"][0, 0, -4:]]
    assert found == seen
