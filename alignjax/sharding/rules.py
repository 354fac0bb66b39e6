"""Names of the axes of an array -> the mesh axes it is split over."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    "positions": None,
    "experts": "expert",
    "router": None,
    "expert_mlp": "tensor",
    "layers": None,
    "rank": None,
    "block": None,
}


def shardings(logical_axes: Any, mesh: Mesh, shapes: Any = None) -> Any:
    """Where each array goes.

    Args:
      logical_axes: pytree of tuples of names, as `Model.logical_axes` gives it.
      shapes: the same tree of anything with a shape; where given, axes that do not divide evenly
        are replicated (see `fit`). `place.init_sharded` does that by itself.
    Raises:
      ValueError: on an axis name without a rule.
    """

    def sharding(axes: tuple[str, ...]) -> NamedSharding:
        unknown = [axis for axis in axes if axis not in RULES]
        if unknown:
            raise ValueError(f"axis {unknown[0]!r} has no rule; those with one: {sorted(RULES)}")
        return NamedSharding(mesh, PartitionSpec(*(RULES[axis] for axis in axes)))

    tree = jax.tree.map(sharding, logical_axes, is_leaf=lambda axes: isinstance(axes, tuple))
    return tree if shapes is None else fit(tree, shapes)


def fit(shardings: Any, shapes: Any) -> Any:
    """Replicates every axis whose size the mesh axes do not divide: 23 words over 2 devices.

    Raises:
      ValueError: if an array has not as many axes as its sharding names.
    """

    def fitted(sharding: NamedSharding, array: Any) -> NamedSharding:
        def kept(size: int, names: str | tuple[str, ...] | None) -> Any:
            split = () if names is None else (names,) if isinstance(names, str) else names
            return None if size % math.prod(sharding.mesh.shape[name] for name in split) else names

        pairs = zip(array.shape, sharding.spec, strict=True)  # an axis too few or many is a mistake
        return NamedSharding(sharding.mesh, PartitionSpec(*(kept(*pair) for pair in pairs)))

    return jax.tree.map(fitted, shardings, shapes)
