"""What phases compile whose policy is compared with another model as it trains: a teacher, or the
reference of pairs that it samples."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.sharding import Mesh

from alignjax.phases.common import Policy
from alignjax.phases.distill import make_top_k, top_k_loss
from alignjax.phases.distill_config import DistillConfig
from alignjax.phases.online_distill import sampled_loss, student_loss
from alignjax.phases.online_distill_config import OnlineDistillConfig
from alignjax.phases.online_preference_config import OnlineConfig
from alignjax.phases.preference_loss import ARRAYS
from alignjax.phases.preference_step import Learner
from alignjax.phases.rollouts import Rows, make_logps
from alignjax.phases.teacher import (
    TEACHER,
    Pair,
    Teacher,
    TeacherConfig,
    divergence_loss,
    with_teacher,
)
from alignjax.plan import weights
from alignjax.plan.given import comparisons, reference_of, texts
from alignjax.plan.programs import (
    BATCH,
    FROZEN,
    OPTIMIZER,
    PARAMS,
    REFERENCE,
    Program,
    Programs,
    train_step,
)
from alignjax.plan.rollouts import Sampled, longest_of, num_tokens_of
from alignjax.plan.sampled import rows_of
from alignjax.plan.shapes import Shapes
from alignjax.plan.work import forward_flops, train_flops
from alignjax.sharding import batch_shards
from alignjax.train.optim import make_optimizer
from alignjax.train.step import make_step


def distill(config: DistillConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The update, beside the teacher or after it was asked."""
    data, k = config.data, config.teacher.top_k
    policy: Any = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    teacher = _teacher(config.teacher, mesh, shapes)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    state = weights.train_state(policy.params, optimizer, mesh)
    arrays = texts(config, mesh)
    shape, num_tokens = arrays["tokens"].shape, float(arrays["tokens"].size)
    flops = train_flops(
        policy.model.config, data.row_len, num_tokens, lora=policy.frozen is not None
    )
    asking = num_tokens * forward_flops(teacher.model.config, data.row_len)
    if k is None:
        pair = Pair.of(policy, teacher, mesh)
        loss = functools.partial(divergence_loss, pair, config.divergence)
        step = _step_beside(loss, optimizer, state, weights.batch(arrays, mesh), policy, teacher)
        return Programs([step.with_flops(flops + asking)], num_tokens, config.loop.steps)
    rows, num_shards = weights.batch(arrays, mesh), batch_shards(mesh)
    width = min(model.config.vocab_size for model in (teacher.model, policy.model))
    ask = make_top_k(teacher.model, num_shards, k, config.divergence.temperature, width)
    asked = Program(
        "teacher scoring",
        lambda: ask.lower(teacher.params, rows),
        (TEACHER, BATCH),
        {PARAMS: policy.params, OPTIMIZER: state.opt_state, FROZEN: policy.frozen}
        | {TEACHER: teacher.params},
        model_flops=asking,
    )
    arrays |= {
        "teacher_ids": np.zeros((*shape, k), np.int32),
        "teacher_logps": np.zeros((*shape, k), np.float32),
    }
    loss = functools.partial(top_k_loss, policy.model, config.divergence.temperature, num_shards)
    update = make_step(loss, optimizer, policy.frozen)
    step = train_step(update, state, weights.batch(arrays, mesh), policy.frozen)
    note = "the teacher is asked once for each record: from the second epoch on it takes no time"
    return Programs([asked, step.with_flops(flops)], num_tokens, config.loop.steps, [note])


def online_distill(
    config: OnlineDistillConfig, mesh: Mesh, shapes: Shapes, apart: Mesh | None = None
) -> Programs:
    """Sampling, what the teacher says of the samples, and updates."""
    sampled = Sampled.of(config, mesh, apart, shapes)
    policy: Any = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    teacher, parts = _teacher(config.teacher, mesh, shapes), config.num_minibatches
    times = config.algorithm.num_updates * parts
    optimizer = make_optimizer(config.optimizer, config.loop.steps * times)
    state = weights.train_state(policy.params, optimizer, mesh)
    resident = {
        PARAMS: policy.params,
        OPTIMIZER: state.opt_state,
        FROZEN: policy.frozen,
        TEACHER: teacher.params,
        **sampled.beside(policy),
    }
    temperature, layout = config.rollout.temperature, Rows.of(config, mesh)
    found = sampled.programs(policy, resident)
    batch = weights.batch(rows_of(layout, "old_logps"), mesh)
    beside = {TEACHER: teacher.params, **sampled.beside(policy)}
    if config.divergence.kind == "sampled_reverse_kl":
        logps: Any = make_logps(teacher.model, mesh, temperature=temperature)
        rows = batch
        found.append(
            Program(
                "teacher scoring",
                lambda: logps.lower(teacher.params, rows),
                (TEACHER, BATCH),
                resident,
                times=parts,
            )
        )
        batch = {**batch, "teacher_logps": batch["old_logps"]}
        loss = functools.partial(sampled_loss, policy.model, temperature, batch_shards(mesh))
        update = make_step(loss, optimizer, policy.frozen)
        step = train_step(update, state, batch, policy.frozen, times=times, beside=beside)
    else:
        pair = Pair.of(policy, teacher, mesh)
        loss = functools.partial(student_loss, pair, config.divergence, temperature)
        step = _step_beside(
            loss, optimizer, state, batch, policy, teacher, times=times, beside=beside
        )
    num_tokens, is_lora = num_tokens_of(config), policy.frozen is not None
    flops = train_flops(policy.model.config, longest_of(config), num_tokens / parts, lora=is_lora)
    return sampled.iteration(policy, [*found, step.with_flops(flops)])


def online_preference(
    config: OnlineConfig, mesh: Mesh, shapes: Shapes, apart: Mesh | None = None
) -> Programs:
    """Sampling, rewards, the reference's log-probs of pairs, and updates."""
    sampled = Sampled.of(config, mesh, apart, shapes)
    policy: Any = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    parts, data = config.num_minibatches, config.data
    times = config.algorithm.num_updates * parts
    optimizer = make_optimizer(config.optimizer, config.loop.steps * times)
    learner: Any = Learner(config, policy, optimizer, mesh, shared_prompt=data.shared_prompt)
    state = weights.train_state(policy.params, optimizer, mesh, extra=learner.first_extra())
    beside = sampled.beside(policy)
    reads, takes = config.objective.reads_reference, config.objective.takes
    scorer, reference, role = reference_of(config, learner, policy, mesh, shapes)
    if reads and role == PARAMS:
        role = REFERENCE  # A copy, for the update is given the others.
    if reads:
        beside[role] = reference
    resident = {PARAMS: policy.params, OPTIMIZER: state.opt_state, FROZEN: policy.frozen, **beside}
    host, _ = comparisons(data, mesh, config.rows_per_update, config.row_len)
    arrays = {name: host[name] for name in ARRAYS}
    found, rows = sampled.programs(policy, resident), weights.batch(arrays, mesh)
    if reads:
        found.append(
            Program(
                "reference scoring",
                lambda: learner.reference_logps.lower(scorer, reference, rows),
                (role, BATCH),
                resident,
                times=parts,
            )
        )
        arrays["ref_logps"] = np.zeros(arrays["ranks"].shape, np.float32)
    prepared, whole = weights.batch(arrays, mesh), policy.whole(policy.params)
    if "kl" in takes:
        found.append(
            Program(
                "mismatch KL",
                lambda: learner.kl.lower(whole, prepared),
                (PARAMS, BATCH),
                resident,
                times=times,
            )
        )
    given = {n: np.zeros(data.micro_batches, np.float32) for n in ("kl", "delta") if n in takes}
    batch = weights.batch(arrays | given, mesh)
    step = train_step(learner.update, state, batch, policy.frozen, times=times, beside=beside)
    return sampled.iteration(policy, [*found, step])


def _teacher(config: TeacherConfig, mesh: Mesh, shapes: Shapes) -> Teacher:
    """As `load_teacher` reads it."""
    found = weights.loaded(
        shapes.of(config.path), mesh, compute=config.compute_dtype, param_dtype=config.param_dtype
    )
    return Teacher(found.model, found.params)


def _step_beside(
    loss: Any, optimizer: Any, state: Any, batch: Any, policy: Policy, teacher: Teacher, **more: Any
) -> Program:
    """An update in which the teacher reads the batch too."""
    frozen = with_teacher(policy, teacher)
    roles = dict.fromkeys(frozen, FROZEN) | {TEACHER: TEACHER}
    beside = {FROZEN: policy.frozen, TEACHER: teacher.params} | more.pop("beside", {})
    update = make_step(loss, optimizer, frozen)
    return train_step(update, state, batch, frozen, frozen_roles=roles, beside=beside, **more)
