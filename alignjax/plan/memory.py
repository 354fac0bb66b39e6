"""A compiled program and what lies beside it -> bytes of each device, by what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from alignjax.plan.programs import Program

GRADIENTS, TEMPORARIES, RESULTS = "gradients", "activations and temporaries", "results"
CODE, PADDING = "program", "padding"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs.

    Attributes:
      parts: by what they are: the roles of arguments and residents, and what the program makes.
      argument_bytes: of the arguments, by their shapes and shardings.
      compiler_argument_bytes: of the arguments by the compiler, which pads the last axes of arrays
        to the tiles of a TPU; the difference is the part "padding".
    """

    parts: Mapping[str, int]
    argument_bytes: int
    compiler_argument_bytes: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def of_program(program: Program, lowered: jax.stages.Lowered, compiled: Any) -> Memory:
    """Adds up what the program is given, what it makes, and what lies beside it.

    Gradients are a float32 number for each parameter that trains, which a step holds until its
    update: a part of what the compiler calls temporaries, the rest of which are activations,
    logits, gathered parameters and buffers of collectives.
    """
    stats = compiled.memory_analysis()
    parts: dict[str, int] = {}
    for role, tree in program.resident.items():
        if size := tree_bytes(tree):
            parts[role] = size
    given = 0
    infos, placed = lowered.args_info[0], compiled.input_shardings[0]
    for role, info, sharding in _leaves(program.roles, infos, placed):
        if sharding is None:  # The program does not read it.
            continue
        size = _bytes(info, sharding)
        given += size
        if role not in program.resident:
            parts[role] = parts.get(role, 0) + size
    gradients = 0
    if program.gradients is not None:
        gradients = 4 * sum(
            math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(program.gradients)
        )
        # Fused into the update they may never exist all at once.
        gradients = min(gradients, stats.temp_size_in_bytes)
    made = {
        GRADIENTS: gradients,
        TEMPORARIES: stats.temp_size_in_bytes - gradients,
        RESULTS: stats.output_size_in_bytes - stats.alias_size_in_bytes,
        CODE: stats.generated_code_size_in_bytes,
        PADDING: stats.argument_size_in_bytes - given,
    }
    return Memory(
        parts | {name: size for name, size in made.items() if size},
        given,
        stats.argument_size_in_bytes,
    )


def tree_bytes(tree: Any) -> int:
    """Of one device, of arrays with shardings."""
    return sum(_bytes(x, x.sharding) for x in jax.tree.leaves(tree))


def _bytes(x: Any, sharding: jax.sharding.Sharding) -> int:
    return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _leaves(roles: Any, infos: Any, shardings: Any) -> list[tuple[str, Any, Any]]:
    """The role, shape and sharding of each argument."""
    found: list[tuple[str, Any, Any]] = []

    def add(role: str, info: Any, sharding: Any) -> None:
        leaves, tree = jax.tree.flatten(info)
        # A sharding of None says that an argument is not read; it is a leaf here.
        placed = tree.flatten_up_to(sharding)
        found.extend(zip([role] * len(leaves), leaves, placed, strict=True))

    jax.tree.map(add, roles, infos, shardings, is_leaf=lambda x: isinstance(x, str))
    return found
