"""What the rollout engine compiles for calls of one size, and how often each program runs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignjax.core.types import Params, Sampling
from alignjax.generate import decode, make_generate
from alignjax.generate.call import Call
from alignjax.generate.decode import Entry, Rows
from alignjax.generate.schedule import Ladder, Slots
from alignjax.models import Model
from alignjax.models.decoding import Own, Prompts, empty_own, kv_sharding
from alignjax.models.kernels.decode import Seats
from alignjax.plan.programs import BATCH, KV, OTHER, PARAMS, Program
from alignjax.plan.weights import placed, replicated

CODED = "coded weights"


def sampling(
    model: Model,
    params: Params,
    limits: Any,
    mesh: Mesh,
    resident: Mapping[str, Any],
    *,
    num_samples: int,
    role: Any = PARAMS,
    **settings: Any,
) -> list[Program]:
    """The programs of one call of the engine, all completions as long as they may become.

    Args:
      params: what the model computes with.
      limits: the `rollout` of a config.
      resident: what lies on the devices meanwhile.
      num_samples: completions of each prompt.
      role: of the parameters.
      settings: of `Sampling`, those that change the programs.
    """
    found = []
    engine = make_generate(
        model, mesh=mesh, max_rows=limits.max_rows,
        int8_kv=limits.int8_kv, int8_weights=limits.int8_weights,
    )  # fmt: skip
    if (quantize := engine._quantize) is not None:
        uncoded = params
        shapes = jax.eval_shape(quantize, params)
        targets = quantize.lower(params).compile().output_shardings
        params = placed(shapes, targets)
        found.append(Program("quantize", lambda: quantize.lower(uncoded), (role,), resident))
        resident, role = {**resident, CODED: params}, CODED
    model, total = engine.model, limits.num_prompts * num_samples
    ladder = Ladder.of(
        limits.num_prompts, limits.max_prompt_tokens, num_samples, limits.max_tokens,
        max_rows=limits.max_rows, num_devices=engine.num_devices,
    )  # fmt: skip
    call = Call(
        model, mesh, params, np.zeros((1, limits.max_prompt_tokens), np.int32),
        np.ones(1, np.int32),
        Sampling(
            temperature=limits.temperature, max_tokens=1, num_samples=1, stop_tokens=(0,),
            **settings,
        ),
        ladder, int8_kv=limits.int8_kv,
    )  # fmt: skip
    prompts, rows = jax.eval_shape(call._empty)
    prompts, first = _prompts(prompts, mesh), _rows(rows, mesh)
    full = _with_capacity(model, rows, ladder.capacity, mesh, is_int8=limits.int8_kv)
    limit_arrays = replicated(call._limits, mesh)
    static: dict[str, Any] = {"model": model, "mesh": mesh}
    num_rows, vocab_size = ladder.rows, model.config.vocab_size
    ints = lambda *shape: replicated(jax.ShapeDtypeStruct(shape, jnp.int32), mesh)  # noqa: E731
    bools = replicated(jax.ShapeDtypeStruct((num_rows,), jnp.bool_), mesh)
    seen = replicated(jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.bool_), mesh)
    entry = Entry(
        bools, rows.keys, ints(num_rows), None if rows.is_seen is None else seen,
        replicated(rows.seats, mesh),
    )  # fmt: skip
    waves = total / num_rows  # Slots are filled again as rows end.
    num_calls = limits.max_tokens * max(1.0, waves) / decode.STEPS
    late = share_of_late(ladder)

    def advance(rows: Any) -> jax.stages.Lowered:
        one = ints()
        return decode.advance.lower(params, prompts, rows, bools, limit_arrays, one, one, **static)

    kept = {**resident, KV: (prompts, full)}
    decoding = (role, KV, KV, BATCH, BATCH, OTHER, OTHER)
    found += [
        Program(
            "prefill",
            lambda: decode.read_into.lower(
                params, prompts, ints(ladder.read, ladder.width), ints(ladder.read),
                ints(ladder.read), **static,
            ),
            (role, KV, BATCH, BATCH, BATCH), {**resident, KV: (prompts, first)},
            times=-(-limits.num_prompts // ladder.read),
        ),
        Program(
            "first tokens",
            lambda: decode.admit.lower(params, prompts, first, entry, limit_arrays, **static),
            (role, KV, KV, BATCH, BATCH), {**resident, KV: (prompts, first)},
            times=1 if waves <= 1 else 4 * waves,  # A quarter of the slots is filled at a time.
        ),
        Program(
            f"decode {decode.STEPS} tokens", lambda: advance(full), decoding, kept,
            times=num_calls * late,
        ),
    ]  # fmt: skip
    if ladder.first_capacity < ladder.capacity:
        half = _with_capacity(model, rows, rungs(ladder)[-2][0], mesh, is_int8=limits.int8_kv)
        found += [
            Program(
                "the same, short cache", lambda: advance(first), decoding,
                {**resident, KV: (prompts, first)}, times=num_calls * (1 - late),
            ),
            Program(
                "grow the cache",
                lambda: decode.grow.lower(half, capacity=ladder.capacity, mesh=mesh), (KV,),
                {**resident, KV: (prompts, half)},
            ),
        ]  # fmt: skip
    if Slots(ladder).can_shrink:
        seats = Seats(ints(num_rows // 2), ints(*rows.seats.rows.shape))
        found.append(
            Program(
                "half of the rows",
                lambda: decode.rearrange.lower(
                    prompts, full, ints(num_rows // 2), ints(ladder.prompts), seats, mesh=mesh
                ),
                (KV, KV, BATCH, BATCH, BATCH), kept,
            )
        )  # fmt: skip
    return found


def rungs(ladder: Ladder) -> list[tuple[int, int]]:
    """The capacities of a call whose rows grow as long as they may, and the steps at each."""
    found, filled, capacity = [], 0, ladder.first_capacity
    while filled < ladder.capacity:
        found.append((capacity, capacity - filled))
        filled, capacity = capacity, min(2 * capacity, ladder.capacity)
    return found


def share_of_late(ladder: Ladder) -> float:
    """The share w of a call's steps, for which w (step at the full cache) + (1 - w) (step at the
    first one) is the mean over its steps: a step's time grows linearly with the cache."""
    capacities, steps = zip(*rungs(ladder), strict=True)
    if len(capacities) == 1:
        return 1.0
    mean = float(np.average(capacities, weights=steps))
    return (mean - capacities[0]) / (capacities[-1] - capacities[0])


def _kv(tree: Any, mesh: Mesh) -> Any:
    return placed(tree, jax.tree.map(lambda x: kv_sharding(x, mesh), tree))


def _prompts(prompts: Prompts, mesh: Mesh) -> Prompts:
    others = replicated(prompts._replace(k=None, v=None), mesh)
    return others._replace(k=_kv(prompts.k, mesh), v=_kv(prompts.v, mesh))


def _rows(rows: Rows, mesh: Mesh) -> Rows:
    own = Own(_kv(rows.own.k, mesh), _kv(rows.own.v, mesh), replicated(rows.own.slot, mesh))
    return replicated(rows._replace(own=None), mesh)._replace(own=own)


def _with_capacity(model: Model, rows: Rows, capacity: int, mesh: Mesh, *, is_int8: bool) -> Rows:
    make = functools.partial(empty_own, model, rows.num_tokens.shape[0], capacity, is_int8=is_int8)
    return _rows(rows._replace(own=jax.eval_shape(make)), mesh)
