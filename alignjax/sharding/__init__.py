"""Devices in a mesh, and which axis of which array goes where."""

from alignjax.sharding.mesh import MeshConfig, batch_shards, make_mesh
from alignjax.sharding.move import moved, sent
from alignjax.sharding.place import (
    batch_shardings,
    constrained,
    copied,
    fetch,
    holders,
    init_sharded,
    placed,
    put_batch,
)
from alignjax.sharding.rules import fit, shardings

__all__ = [
    "MeshConfig",
    "batch_shardings",
    "batch_shards",
    "constrained",
    "copied",
    "fetch",
    "fit",
    "holders",
    "init_sharded",
    "make_mesh",
    "moved",
    "placed",
    "put_batch",
    "sent",
    "shardings",
]
