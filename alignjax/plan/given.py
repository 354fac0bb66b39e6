"""What phases compile that train on texts or comparisons as they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from alignjax.data import Element, pack
from alignjax.data.comparison_rows import pack_elements
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.phases import reward as reward_phase
from alignjax.phases import sft as sft_phase
from alignjax.phases.common import checked_rows
from alignjax.phases.comparisons import ComparisonData
from alignjax.phases.preference_config import PreferenceConfig
from alignjax.phases.preference_loss import ARRAYS, K
from alignjax.phases.preference_step import Learner
from alignjax.phases.reward_config import RewardPhaseConfig
from alignjax.plan import weights
from alignjax.plan.programs import (
    BATCH,
    FROZEN,
    OPTIMIZER,
    PARAMS,
    REFERENCE,
    Program,
    Programs,
    state_roles,
)
from alignjax.plan.shapes import Shapes
from alignjax.sharding import batch_shards
from alignjax.train.optim import make_optimizer


def sft(config: sft_phase.SftConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The update, and the evaluation where there are held-out records."""
    data, policy = config.data, weights.policy(
        config.model, shapes.of_source(config.model, config), mesh
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    functions = sft_phase.make_functions(policy.model, optimizer, mesh, policy.frozen)
    state = weights.train_state(policy.params, optimizer, mesh)
    rows = checked_rows(data.rows, mesh)
    host, _ = pack([_sequence()], num_rows=data.micro_batches * rows, row_len=data.row_len)
    shape = data.micro_batches, rows, data.row_len
    arrays = {name: array.reshape(shape) for name, array in host.items()}
    if config.model.lora is not None and config.model.lora.dropout:
        arrays["dropout_seed"] = np.zeros(data.micro_batches, np.uint32)
    batch = weights.batch(arrays, mesh)
    resident = {PARAMS: policy.params, OPTIMIZER: state.opt_state, FROZEN: policy.frozen}
    trips = chunks(data.row_len, data.row_len, rows // batch_shards(mesh))
    step = Program(
        "train step", lambda: functions.step.lower(state, batch), (state_roles(), FROZEN, BATCH),
        resident, dynamic_trips=trips, gradients=policy.params,
    )  # fmt: skip
    found = [step]
    if data.eval is not None:
        whole = policy.whole(policy.params)
        found.append(
            Program(
                "evaluation",
                lambda: functions.evaluate.lower(whole, batch),
                (PARAMS, BATCH),
                resident,
                times=0.0,
                dynamic_trips=trips,
            )  # fmt: skip
        )
    return Programs(found, float(np.prod(shape)), config.loop.steps)


def reward(config: RewardPhaseConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The update, and what scores held-out and reference responses."""
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    model, trained = weights.scalar(policy, mesh)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    functions = reward_phase.make_functions(config, model, optimizer, trained.frozen)
    state = weights.train_state(trained.params, optimizer, mesh)
    arrays, num_tokens = comparisons(config.data, mesh)
    batch = weights.batch(arrays, mesh)
    resident = {PARAMS: trained.params, OPTIMIZER: state.opt_state, FROZEN: trained.frozen}
    whole = trained.whole(trained.params)
    return Programs(
        [
            Program(
                "train step", lambda: functions.step.lower(state, batch),
                (state_roles(), FROZEN, BATCH), resident, gradients=trained.params,
            ),
            Program(
                "scoring", lambda: functions.scores.lower(whole, batch), (PARAMS, BATCH), resident,
                times=0.0,
            ),
        ],
        num_tokens, config.loop.steps, _TWO if config.data.pairs is None else [],
    )  # fmt: skip


def preference(config: PreferenceConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The update, the reference's log-probs before the first, and the KL of losses that take it."""
    data, policy = config.data, weights.policy(
        config.model, shapes.of_source(config.model, config), mesh
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    learner: Any = Learner(config, policy, optimizer, mesh, shared_prompt=data.shared_prompt)
    state = weights.train_state(policy.params, optimizer, mesh, extra=learner.first_extra())
    host, num_tokens = comparisons(data, mesh)
    arrays = {name: host[name] for name in ARRAYS}
    rows = weights.batch(arrays, mesh)
    if config.objective.reads_reference:
        arrays["ref_logps"] = np.zeros(host["ranks"].shape, np.float32)
    if data.prob_field is not None:
        arrays["preference_prob"] = host["margins"]
    given = {n: np.zeros(data.micro_batches, np.float32) for n in ("kl", "delta")}
    arrays |= {name: x for name, x in given.items() if name in config.objective.takes}
    batch = weights.batch(arrays, mesh)
    resident = {PARAMS: policy.params, OPTIMIZER: state.opt_state, FROZEN: policy.frozen}
    rows_each = data.num_prompts // data.micro_batches // batch_shards(mesh)
    trips = chunks(data.row_len, data.row_len, rows_each)
    whole = policy.whole(policy.params)
    found = [
        Program(
            "train step", lambda: learner.update.lower(state, batch),
            (state_roles(), FROZEN, BATCH), resident, dynamic_trips=trips, gradients=policy.params,
        )
    ]  # fmt: skip
    if config.objective.reads_reference:
        scorer, reference = learner.reference_scorer, whole
        before = {PARAMS: policy.params, FROZEN: policy.frozen}  # No optimizer yet.
        role: Any = PARAMS if policy.frozen is None else FROZEN
        if config.reference is not None:
            other = weights.loaded(
                shapes.of(config.reference), mesh, compute=config.model.compute_dtype,
                param_dtype=config.model.param_dtype,
            )  # fmt: skip
            scorer, reference = scorer._replace(model=other.model), other.params
            before[REFERENCE], role = reference, REFERENCE
        elif policy.frozen is not None:
            scorer, reference = scorer._replace(model=policy.reference_model), policy.frozen
        found.insert(
            0,
            Program(
                "reference scoring",
                lambda: learner.reference_logps.lower(scorer, reference, rows), (role, BATCH),
                before, times=1.0, dynamic_trips=trips,
            ),
        )  # fmt: skip
    if "kl" in config.objective.takes:
        found.insert(
            len(found) - 1,
            Program(
                "mismatch KL", lambda: learner.kl.lower(whole, rows), (PARAMS, BATCH), resident,
                dynamic_trips=trips,
            ),
        )  # fmt: skip
    notes = ["the reference's log-probs are computed once for all epochs: from the second epoch on "
             "an iteration is the train step alone"]  # fmt: skip
    return Programs(
        found, num_tokens, config.loop.steps, notes if config.objective.reads_reference else []
    )


def comparisons(data: ComparisonData, mesh: Mesh) -> tuple[dict[str, Any], float]:
    """Rows of comparisons [M, R, ...] without content; and their tokens, if they were full."""
    rows, ids = checked_rows(data.num_prompts // data.micro_batches, mesh), np.zeros(1, np.int32)
    host = pack_elements(
        [Element(ids, (ids, ids), (1, 2))],
        num_rows=rows * data.micro_batches, row_len=data.row_len, num_responses=K,
        shared_prompt=data.shared_prompt, packed=data.packed,
    )  # fmt: skip
    shape = data.micro_batches, rows
    arrays = {name: array.reshape(*shape, *array.shape[1:]) for name, array in host.items()}
    return arrays, float(data.num_prompts * data.row_len)


def chunks(num_targets: int, row_len: int, rows_each: int) -> int:
    """Chunks of logits that rows with so many targets at most take; see `losses.vocabulary`."""
    size = min(default_chunk_size(max(rows_each, 1)), row_len)
    return -(-num_targets // size)


def _sequence(**more: Any) -> dict[str, np.ndarray]:
    """Two tokens, of which the second is trained."""
    return {"tokens": np.zeros(2, np.int32), "mask": np.array([False, True]), **more}


_TWO = ["two responses to each prompt are taken for granted: how many there are the data say"]
