"""Adapters of projections <-> adapters of the modules of transformers, which may hold several.

Phi-3 and GPT-2 have one tensor for queries, keys and values, Phi-3 also one for gate and up.
Adapters of k of its parts are one adapter of the whole, of k times the rank: their `a` above each
other, their `b` along a diagonal of blocks. And one adapter of the whole, as PEFT makes it, is one
of each part with the same `a`. Both are the same function; no number is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from alignjax.core.errors import UserError
from alignjax.models.lora import plain
from alignjax.models.tensors import TENSORS
from alignjax.models.transformer import Model

Matrices = Mapping[str, np.ndarray]
"""`a` [L, r, inputs], `b` [L, outputs, r] and with DoRA `magnitude` [L, outputs]."""


class Module(NamedTuple):
    """A module of transformers, and which of the projections in it are adapted."""

    name: str
    """Such as model.layers.{layer}.self_attn.q_proj."""
    projections: tuple[str, ...]
    """Dotted paths, such as attention.query, in the order of the tensor."""
    rows: tuple[slice, ...]
    """Outputs of each of them in the module's tensor."""
    num_outputs: int

    @property
    def target(self) -> str:
        """What PEFT finds it by in every layer."""
        return self.name.partition("{layer}.")[2]

    def join(self, parts: Sequence[Matrices]) -> dict[str, np.ndarray]:
        """One adapter of the module, from those of its projections."""
        num_layers, rank, _ = parts[0]["a"].shape
        b = np.zeros((num_layers, self.num_outputs, len(parts) * rank), np.float32)
        for i, (rows, part) in enumerate(zip(self.rows, parts, strict=True)):
            b[:, rows, i * rank : (i + 1) * rank] = part["b"]
        found = {"a": np.concatenate([part["a"] for part in parts], 1), "b": b}
        if "magnitude" not in parts[0]:
            return found
        if sum(rows.stop - rows.start for rows in self.rows) != self.num_outputs:
            raise UserError(
                f"{self.target} of transformers holds more than the projections that are adapted, "
                f"{', '.join(self.projections)}, and DoRA's magnitudes are of all of it: export "
                "the merged weights, without --adapter, or adapt all of its projections"
            )
        return found | {"magnitude": np.concatenate([part["magnitude"] for part in parts], 1)}

    def share(self, parts: Sequence[Matrices]) -> dict[str, np.ndarray]:
        """In the shapes of one adapter of the module that has the rank of each; its numbers mean
        nothing."""
        rank = parts[0]["a"].shape[1]
        whole = self.join(parts)
        return whole | {"a": whole["a"][:, :rank], "b": whole["b"][:, :, :rank]}

    def parted(self, whole: Matrices, is_joined: bool) -> list[dict[str, np.ndarray]]:
        """Adapters of the projections, from one of the module.

        Args:
          is_joined: as `join` makes it; else every projection has the whole `a`.
        Raises:
          UserError: if it is not as `join` makes it.
        """
        a, b, k = whole["a"], whole["b"], len(self.projections)
        rank = a.shape[1] // k if is_joined else a.shape[1]
        found = []
        for i, rows in enumerate(self.rows):
            own = slice(i * rank, (i + 1) * rank) if is_joined else slice(None)
            found.append({"a": a[:, own], "b": b[:, rows, own]})
            if "magnitude" in whole:
                found[-1]["magnitude"] = whole["magnitude"][:, rows]
        used = np.zeros(b.shape[1:], bool)
        for i, rows in enumerate(self.rows):
            used[rows, i * rank : (i + 1) * rank] = True
            if not is_joined:
                used[rows] = True
        if b[:, ~used].any():
            raise UserError(
                f"the adapter of {self.target} is not one of {', '.join(self.projections)} alone, "
                "each with a part of its rank: adapt all that this module holds (lora.targets)"
            )
        return found


def modules_of(model: Model, projections: Collection[str]) -> list[Module]:
    """The modules that hold these projections, and where."""
    shapes = jax.eval_shape(plain(model).init, jax.random.key(0))["layers"]
    found = []
    for name, tensor in TENSORS[model.config.family].items():
        dotted = [".".join(path[1:-1]) for path in tensor.paths]
        if tensor.paths[0][-1] != "kernel" or not set(dotted) & set(projections):
            continue
        rows, start = [], 0
        for path in tensor.paths:
            leaf = shapes
            for key in path[1:-1]:
                leaf = leaf[key]
            size = int(np.prod(leaf["kernel"].shape[1 + tensor.num_inputs :]))
            rows.append(slice(start, start + size))
            start += size
        adapted = [i for i, path in enumerate(dotted) if path in projections]
        found.append(
            Module(
                name.removesuffix(".weight"),
                tuple(dotted[i] for i in adapted),
                tuple(rows[i] for i in adapted),
                start,
            )
        )
    return found
