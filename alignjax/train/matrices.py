"""Names and shapes of parameters -> which are matrices, and between which axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from optax.contrib import MuonDimensionNumbers

if TYPE_CHECKING:
    from jax import Array

    from alignjax.core.types import Params


def is_matrix(path: tuple, leaf: Array) -> bool:
    """True for what is a matrix in one layer. Biases and norm scales are vectors there, but carry a
    leading layer axis when stacked, so names decide, not ranks."""
    vectors = "norm", "bias", "magnitude"
    return leaf.ndim >= 2 and not any(v in name for v in vectors for name in _names(path))


def are_matrices(params: Params) -> Params:
    """A tree of bools like params."""
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def layer_matrices(params: Params) -> Any:
    """For each leaf the axes that a matrix of a layer maps from and to, or None for all others:
    embeddings, unembedding, heads, routers, and what is not a matrix.

    Axes in neither, layers and experts, count several matrices. A projection to or from heads is
    one matrix, [D, heads times head_dim] or its transpose.
    """

    def axes(path: tuple, leaf: Array) -> MuonDimensionNumbers | None:
        names = _names(path)
        if "layers" not in names or names[-1] == "router" or not is_matrix(path, leaf):
            return None
        if names[-1] in ("gate", "up", "down"):  # Of experts: [layers, experts, from, to].
            return MuonDimensionNumbers(2, 3)
        last = leaf.ndim - 1
        # The output of attention comes from heads, two axes; so does `a` of its adapter.
        if names[-1] == "a" or (names[-1] == "kernel" and "out" in names):
            return MuonDimensionNumbers(tuple(range(1, last)), last)
        return MuonDimensionNumbers(1, tuple(range(2, last + 1)))

    return jax.tree_util.tree_map_with_path(axes, params)


def _names(path: tuple) -> list[str]:
    return [str(getattr(part, "key", part)) for part in path]
