"""What phases compile that train on texts or comparisons as they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.sharding import Mesh

from alignjax.data import Element, pack
from alignjax.data.comparison_rows import pack_elements
from alignjax.phases import reward as reward_phase
from alignjax.phases import sft as sft_phase
from alignjax.phases.common import checked_rows
from alignjax.phases.comparisons import ComparisonData
from alignjax.phases.distill_config import DistillConfig
from alignjax.phases.online_preference_config import OnlineData
from alignjax.phases.preference_config import ObjectiveConfig, PreferenceConfig
from alignjax.phases.preference_loss import ARRAYS, K, Scorer
from alignjax.phases.preference_step import Learner
from alignjax.phases.reward_config import RewardPhaseConfig
from alignjax.plan import weights
from alignjax.plan.programs import BATCH, FROZEN, PARAMS, REFERENCE, Program, Programs, train_step
from alignjax.plan.shapes import Shapes
from alignjax.plan.work import forward_flops, train_flops
from alignjax.train.optim import make_optimizer


def sft(config: sft_phase.SftConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The update, and the evaluation where there are held-out records."""
    data = config.data
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    functions = sft_phase.make_functions(policy.model, optimizer, mesh, policy.frozen)
    state = weights.train_state(policy.params, optimizer, mesh)
    arrays = texts(config, mesh)
    batch, num_tokens = weights.batch(arrays, mesh), float(arrays["tokens"].size)
    step = train_step(functions.step, state, batch, policy.frozen)
    is_lora = policy.frozen is not None
    flops = train_flops(policy.model.config, data.row_len, num_tokens, lora=is_lora)
    found = [step.with_flops(flops)]
    if data.eval is not None:
        whole = policy.whole(policy.params)
        found.append(
            Program(
                "evaluation",
                lambda: functions.evaluate.lower(whole, batch),
                (PARAMS, BATCH),
                step.resident,
                times=0.0,
            )
        )
    return Programs(found, num_tokens, config.loop.steps)


def reward(config: RewardPhaseConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The update, and what scores held-out and reference responses."""
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    model, trained = weights.scalar(policy, mesh)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    functions = reward_phase.make_functions(config, model, optimizer, trained.frozen)
    state = weights.train_state(trained.params, optimizer, mesh)
    data = config.data
    arrays, num_tokens = comparisons(data, mesh, data.num_prompts, data.row_len)
    batch = weights.batch(arrays, mesh)
    step = train_step(functions.step, state, batch, trained.frozen)
    whole, is_lora = trained.whole(trained.params), trained.frozen is not None
    flops = train_flops(model.decoder.config, data.row_len, num_tokens, unembed=False, lora=is_lora)
    scoring = Program(
        "scoring",
        lambda: functions.scores.lower(whole, batch),
        (PARAMS, BATCH),
        step.resident,
        times=0.0,
    )
    notes = [] if data.pairs is not None else [_TWO]
    return Programs([step.with_flops(flops), scoring], num_tokens, config.loop.steps, notes)


def preference(config: PreferenceConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """The reference's log-probs, the KL of losses that take it, and the update."""
    data = config.data
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    optimizer = make_optimizer(config.optimizer, config.loop.steps)
    learner: Any = Learner(config, policy, optimizer, mesh, shared_prompt=data.shared_prompt)
    state = weights.train_state(policy.params, optimizer, mesh, extra=learner.first_extra())
    host, num_tokens = comparisons(data, mesh, data.num_prompts, data.row_len)
    arrays = {name: host[name] for name in ARRAYS}
    rows, takes = weights.batch(arrays, mesh), config.objective.takes
    if config.objective.reads_reference:
        arrays["ref_logps"] = np.zeros(host["ranks"].shape, np.float32)
    if data.prob_field is not None:
        arrays["preference_prob"] = host["margins"]
    prepared = weights.batch(arrays, mesh)
    arrays |= {
        name: np.zeros(data.micro_batches, np.float32) for name in ("kl", "delta") if name in takes
    }
    step = train_step(learner.update, state, weights.batch(arrays, mesh), policy.frozen)
    is_lora, shape = policy.frozen is not None, policy.model.config
    found = [step.with_flops(train_flops(shape, data.row_len, num_tokens, lora=is_lora))]
    whole = policy.whole(policy.params)
    if "kl" in takes:
        kl = Program(
            "mismatch KL", lambda: learner.kl.lower(whole, prepared), (PARAMS, BATCH), step.resident
        )
        found.insert(0, kl)
    if not config.objective.reads_reference:
        return Programs(found, num_tokens, config.loop.steps)
    scorer, reference, role = reference_of(config, learner, policy, mesh, shapes)
    before = {PARAMS: policy.params, FROZEN: policy.frozen}  # There is no optimizer yet.
    scoring = Program(
        "reference scoring",
        lambda: learner.reference_logps.lower(scorer, reference, rows),
        (role, BATCH),
        before | {role: reference},
        model_flops=num_tokens * forward_flops(scorer.model.config, data.row_len),
    )
    return Programs([scoring, *found], num_tokens, config.loop.steps, [_ONCE])


def reference_of(
    config: ObjectiveConfig, learner: Any, policy: weights.Weights, mesh: Mesh, shapes: Shapes
) -> tuple[Scorer, Any, str]:
    """As `Learner.reference`: how rows are computed, with which weights; and their role."""
    scorer, source = learner.reference_scorer, config.model
    if config.reference is not None:
        other = weights.loaded(
            shapes.of(config.reference),
            mesh,
            compute=source.compute_dtype,
            param_dtype=source.param_dtype,
        )
        return scorer._replace(model=other.model), other.params, REFERENCE
    if policy.frozen is not None:
        return scorer._replace(model=policy.reference_model), policy.frozen, FROZEN
    return scorer, policy.params, PARAMS


def texts(config: sft_phase.SftConfig | DistillConfig, mesh: Mesh) -> dict[str, np.ndarray]:
    """Rows of texts [M, R, T] without content, and seeds [M] where adapters drop out."""
    data, lora = config.data, config.model.lora
    shape = data.micro_batches, checked_rows(data.rows, mesh), data.row_len
    sequence = {"tokens": np.zeros(2, np.int32), "mask": np.array([False, True])}
    host, _ = pack([sequence], num_rows=shape[0] * shape[1], row_len=data.row_len)
    arrays = {name: array.reshape(shape) for name, array in host.items()}
    if lora is not None and lora.dropout:
        arrays["dropout_seed"] = np.zeros(data.micro_batches, np.uint32)
    return arrays


def comparisons(
    data: ComparisonData | OnlineData, mesh: Mesh, num_rows: int, row_len: int
) -> tuple[dict[str, Any], float]:
    """Rows of comparisons [M, R, ...] without content; and their tokens, if they were full."""
    shape = data.micro_batches, checked_rows(num_rows // data.micro_batches, mesh)
    ids = np.zeros(1, np.int32)
    host = pack_elements(
        [Element(ids, (ids, ids), (1, 2))],
        num_rows=num_rows,
        row_len=row_len,
        num_responses=K,
        shared_prompt=data.shared_prompt,
        packed=data.packed,
    )
    arrays = {name: array.reshape(*shape, *array.shape[1:]) for name, array in host.items()}
    return arrays, float(num_rows * row_len)


_TWO = "two responses to each prompt are taken for granted: how many there are the data say"
_ONCE = (
    "the reference is asked once for each record: from the second epoch on an iteration is shorter"
)
