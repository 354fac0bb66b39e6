"""What phases compile that train on, or write down, what a model samples."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.errors import UserError
from alignjax.losses import KlControl
from alignjax.phases import grpo as grpo_phase
from alignjax.phases import ppo as ppo_phase
from alignjax.phases.critic import CRITICS, separate_values
from alignjax.phases.grpo_config import GrpoConfig, RlConfig
from alignjax.phases.ppo_config import PpoConfig
from alignjax.phases.ppo_rows import numbered, with_texts
from alignjax.phases.ppo_state import Extra
from alignjax.phases.rollouts import Rows
from alignjax.phases.sample_config import ResponsesConfig
from alignjax.phases.scoring import scored_shape
from alignjax.plan import weights
from alignjax.plan.given import chunks
from alignjax.plan.programs import (
    BATCH,
    FROZEN,
    OPTIMIZER,
    OTHER,
    PARAMS,
    REFERENCE,
    Program,
    Programs,
    state_roles,
)
from alignjax.plan.sampling import sampling
from alignjax.plan.shapes import Shapes
from alignjax.rewards.combine import RewardConfig
from alignjax.sharding import batch_shards
from alignjax.train.step import Batch

CRITIC = "critic"


def grpo(config: GrpoConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Sampling, rewards, log-probs of the reference, and updates."""
    _check(config)
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    algorithm, limits = config.algorithm, config.rollout
    functions = grpo_phase.make_functions(config, policy.model, mesh, policy.frozen)
    has_own = algorithm.kl_coef > 0 and (policy.frozen is None or algorithm.reference_every > 0)
    reference = policy.params if has_own else None
    state = weights.train_state(
        policy.params, functions.optimizer, mesh,
        reference=reference if algorithm.reference_every else None,
    )  # fmt: skip
    layout = Rows.shared_where(config, mesh)
    host = _packed(layout, advantages=np.zeros(2, np.float32))
    resident = {
        PARAMS: policy.params, OPTIMIZER: state.opt_state, FROZEN: policy.frozen,
        REFERENCE: reference,
    }  # fmt: skip
    scorers, models = _rewards(config.rewards, mesh, shapes, _longest(config))
    resident |= models
    whole = policy.whole(policy.params)
    if has_own:
        ref_params, ref_role = policy.whole(policy.params), REFERENCE
    else:
        ref_params, ref_role = policy.frozen, FROZEN
    trips = _chunks(layout, config, mesh)
    updates = algorithm.num_updates * algorithm.num_minibatches
    found = _rollouts(config, policy, mesh, resident, scorers)
    batch = weights.batch(host, mesh)
    scored = {"dynamic_trips": trips, "times": algorithm.num_minibatches}
    if algorithm.kl_coef > 0 and algorithm.kl_in_reward:
        every = _packed(layout, algorithm.num_minibatches, index=np.zeros(2, np.int32))
        del every["index"]
        all_rows = weights.batch(every, mesh)
        found.append(
            Program(
                "reference scoring", lambda: functions.ref_logps.lower(ref_params, all_rows),
                (ref_role, BATCH), resident, dynamic_trips=trips,
            )
        )  # fmt: skip
    if algorithm.old_logps == "trainer":
        rows = {**batch, "sampler_logps": batch["old_logps"]}
        found.append(
            Program(
                "old log-probs", lambda: functions.logps.lower(whole, rows), (PARAMS, BATCH),
                resident, **scored,
            )
        )  # fmt: skip
        batch = rows
    if algorithm.has_kl_in_loss and not functions.has_joint_reference:
        given = batch
        found.append(
            Program(
                "reference scoring", lambda: functions.ref_logps.lower(ref_params, given),
                (ref_role, BATCH), resident, **scored,
            )
        )  # fmt: skip
        batch = {**batch, "ref_logps": batch["old_logps"]}
    found.append(
        Program(
            "train step", lambda: functions.step.lower(state, batch), (state_roles(), FROZEN, BATCH),
            resident, times=updates, dynamic_trips=trips, gradients=policy.params,
        )
    )  # fmt: skip
    return Programs(found, _num_tokens(config), config.loop.steps, list(_NOTES))


def ppo(config: PpoConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Sampling, rewards, what reference and critic say, advantages, and updates."""
    _check(config)
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    algorithm = config.algorithm
    critic, critic_params = _critic(config, policy, mesh, shapes)
    functions = ppo_phase.make_functions(config, policy.model, critic, mesh, policy.frozen)
    params = {"policy": policy.params, critic.name: critic_params}
    extra = Extra(KlControl(jnp.float32(0)), losses.init_moments())
    state = weights.train_state(params, functions.optimizer, mesh, extra=extra)
    is_lora = policy.frozen is not None
    reference = None if is_lora else policy.params
    resident = {
        PARAMS: policy.params, CRITIC: critic_params, OPTIMIZER: state.opt_state,
        FROZEN: policy.frozen, REFERENCE: reference,
    }  # fmt: skip
    scorers, models = _rewards(config.rewards, mesh, shapes, _longest(config))
    resident |= models
    layout = Rows.of(config, mesh)
    trips = _chunks(layout, config, mesh)
    one = {"tokens": np.zeros(2, np.int32), "mask": np.array([False, True]),
           "old_logps": np.zeros(2, np.float32)}  # fmt: skip
    packed = layout.pack(numbered([one], np.zeros(1)), config.num_minibatches)
    del packed["index"]
    batch = weights.batch(packed, mesh)
    whole = {**params, "policy": policy.whole(policy.params)}
    roles = {"policy": PARAMS, critic.name: CRITIC}
    found = _rollouts(config, policy, mesh, resident, scorers)
    if algorithm.old_logps == "trainer":
        batch = {**batch, "sampler_logps": batch["old_logps"]}
        rows = batch
        found.append(
            Program(
                "old log-probs", lambda: functions.logps.lower(whole["policy"], rows),
                (PARAMS, BATCH), resident, dynamic_trips=trips,
            )
        )  # fmt: skip
    num_rows, row_len = layout.num_rows * config.num_minibatches, layout.row_len
    flat = [
        jax.ShapeDtypeStruct((num_rows, row_len), kind)
        for kind in (*[np.float32] * 4, np.bool_, np.int32)
    ]
    flat = [*weights.batch(dict(enumerate(flat)), mesh, 0).values()]  # type: ignore[arg-type]
    coefficient = weights.replicated(jax.ShapeDtypeStruct((), np.float32), mesh)
    update = {
        **_packed(layout),
        **{name: np.zeros(_shape(layout), np.float32) for name in _EXPERIENCE},
    }
    if algorithm.old_logps == "trainer":
        update["sampler_logps"] = update["old_logps"]
    if config.ptx is not None:
        shape = layout.num_parts, config.ptx.rows, layout.row_len
        texts = {"tokens": np.zeros(shape, np.int32), "mask": np.ones(shape, bool),
                 "segment_ids": np.ones(shape, np.int32), "positions": np.zeros(shape, np.int32)}  # fmt: skip
        update = with_texts({**update, "mask": np.ones(_shape(layout), bool)}, texts)
    rows_of_update = weights.batch(update, mesh)
    ref_params = policy.frozen if is_lora else policy.params
    found += [
        Program(
            "reference scoring", lambda: functions.ref_logps.lower(ref_params, batch),
            (FROZEN if is_lora else REFERENCE, BATCH), resident, dynamic_trips=trips,
        ),
        Program(
            "critic scoring", lambda: functions.values.lower(whole, batch), (roles, BATCH),
            resident,
        ),
        Program(
            "advantages", lambda: functions.experience.lower(*flat, coefficient),
            (*[BATCH] * len(flat), OTHER), resident,
        ),
        Program(
            "train step", lambda: functions.step.lower(state, rows_of_update),
            (state_roles()._replace(params=roles), FROZEN, BATCH), resident,
            times=algorithm.num_epochs * config.num_minibatches, dynamic_trips=trips,
            gradients=params,
        ),
    ]  # fmt: skip
    return Programs(found, _num_tokens(config), config.loop.steps, list(_NOTES))


def responses(config: ResponsesConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Phases sample and reject: completions of a batch of prompts, and their rewards."""
    limits, rewards = config.rollout, getattr(config, "rewards", None)
    model = weights.loaded(shapes.of(config.model.path), mesh, compute=config.model.compute_dtype)
    longest = limits.max_prompt_tokens + limits.max_tokens
    scorers, models = _rewards(rewards, mesh, shapes, longest)
    resident = {PARAMS: model.params, **models}
    found = sampling(
        model.model, model.params, limits, mesh, resident,
        num_samples=limits.num_samples, repetition_penalty=limits.repetition_penalty,
    )  # fmt: skip
    total = limits.num_prompts * limits.num_samples
    found += [_scoring(*scorer, mesh, resident, longest, total) for scorer in scorers]
    most = config.data.num_prompts
    steps = 1 if most is None else -(-most // limits.num_prompts)
    notes = list(_NOTES)
    if most is None:
        notes.append("how many prompts there are the data say: one batch of them is counted")
    return Programs(found, float(total * longest), steps, notes)


_EXPERIENCE = ("returns", "advantages", "old_values")
_NOTES = (
    "prompts and completions are taken to be as long as they may be, and one round of sampling to "
    "an iteration",
)


def _check(config: RlConfig) -> None:
    if config.deterministic:
        raise UserError(
            "deterministic: true samples as one device of a CPU does, to look for faults: leave it "
            "out to plan"
        )


def _rollouts(
    config: RlConfig, policy: weights.Weights, mesh: Mesh, resident: dict[str, Any], scorers: Any
) -> list[Program]:
    """Sampling by the policy, and the reward models that score it."""
    limits = config.rollout
    whole = policy.whole(policy.params)
    found = sampling(policy.model, whole, limits, mesh, resident, num_samples=limits.group_size)
    total = limits.num_prompts * limits.group_size
    longest = _longest(config)
    return found + [_scoring(*scorer, mesh, resident, longest, total) for scorer in scorers]


def _rewards(
    config: RewardConfig | None, mesh: Mesh, shapes: Shapes, longest: int
) -> tuple[list[tuple[str, Any, Any]], dict[str, Any]]:
    """Name, model and parameters of each reward model; and the parameters by their role."""
    found = []
    for name, model in ({} if config is None else config.models).items():
        found.append((name, *weights.reward_model(model, shapes.of(model.path), mesh)))
    return found, {f"reward {name}": params for name, _, params in found}


def _scoring(
    name: str, model: Any, params: Any, mesh: Mesh, resident: dict[str, Any], longest: int,
    num_texts: int,
) -> Program:  # fmt: skip
    num_rows, row_len = scored_shape(longest, mesh)
    tokens = np.zeros((num_rows, row_len), np.int32)
    rows = weights.batch(dict.fromkeys(("tokens", "segments", "positions"), tokens), mesh, 0)
    in_row = max(1, row_len // longest)
    return Program(
        f"reward {name}", lambda: jax.jit(model.apply).lower(params, *rows.values()),
        (f"reward {name}", BATCH, BATCH, BATCH), resident,
        times=-(-num_texts // (in_row * num_rows)),
    )  # fmt: skip


def _critic(
    config: PpoConfig, policy: weights.Weights, mesh: Mesh, shapes: Shapes
) -> tuple[Any, Any]:
    """What `phases.critic` makes, without weights: a critic, and its parameters."""
    if config.critic.trunk == "shared":
        critic = CRITICS["shared"](config, policy, mesh)
        head = jax.eval_shape(functools.partial(critic.init, None), jax.random.PRNGKey(0))
        return critic, weights.replicated(head, mesh)
    path = None if config.critic.from_policy else config.critic.path
    if path is None and not config.critic.from_policy:
        path = next((model.path for model in config.rewards.models.values()), None)
    source = config.model.model_copy(update={"lora": None, "quantize": None, "adapter": None})
    shape = policy.model.config if path is None else shapes.of(path)
    model, found = weights.scalar(weights.policy(source, shape, mesh), mesh)

    def values(params: Any, batch: Batch, hidden: Any) -> Any:
        return separate_values(model, params[CRITIC], batch)

    return SimpleNamespace(name=CRITIC, values=values), found.params


def _packed(layout: Rows, num_updates: int = 1, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of an update as `Rows.pack` lays them out, almost empty."""
    one = {"tokens": np.zeros(2, np.int32), "mask": np.array([False, True]),
           "old_logps": np.zeros(2, np.float32), **more}  # fmt: skip
    return layout.pack([one], num_updates)


def _shape(layout: Rows) -> tuple[int, int, int]:
    return layout.num_parts, layout.num_rows // layout.num_parts, layout.row_len


def _chunks(layout: Rows, config: RlConfig, mesh: Mesh) -> int:
    rows_each = layout.num_rows // layout.num_parts // batch_shards(mesh)
    return chunks(config.rollout.max_tokens * layout.num_sharing, layout.row_len, rows_each)


def _longest(config: RlConfig) -> int:
    return config.rollout.max_prompt_tokens + config.rollout.max_tokens


def _num_tokens(config: RlConfig) -> float:
    return float(config.rollout.num_prompts * config.rollout.group_size * _longest(config))
