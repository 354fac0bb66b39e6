"""What phases compile that train on what a model samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alignjax import losses
from alignjax.losses import KlControl
from alignjax.phases import grpo as grpo_phase
from alignjax.phases import ppo as ppo_phase
from alignjax.phases.critic import CRITICS, separate_values
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.phases.ppo_config import PpoConfig
from alignjax.phases.ppo_rows import with_texts
from alignjax.phases.ppo_state import Extra
from alignjax.phases.rollouts import Rows
from alignjax.plan import weights
from alignjax.plan.programs import (
    BATCH,
    FROZEN,
    OPTIMIZER,
    OTHER,
    PARAMS,
    REFERENCE,
    STATE,
    Program,
    Programs,
    train_step,
)
from alignjax.plan.rollouts import Sampled, longest_of, num_tokens_of
from alignjax.plan.shapes import Shapes
from alignjax.plan.work import forward_flops, train_flops
from alignjax.train.step import Batch

CRITIC = "critic"


def grpo(config: GrpoConfig, mesh: Mesh, shapes: Shapes, apart: Mesh | None = None) -> Programs:
    """Sampling, rewards, log-probs of the reference, and updates."""
    sampled = Sampled.of(config, mesh, apart, shapes)
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    algorithm, frozen, whole = config.algorithm, policy.frozen, policy.whole(policy.params)
    functions = grpo_phase.make_functions(config, policy.model, mesh, frozen)
    has_own = algorithm.kl_coef > 0 and (frozen is None or algorithm.reference_every > 0)
    reference = policy.params if has_own else None
    ref_role, ref_params = (REFERENCE, whole) if has_own else (FROZEN, frozen)
    state = weights.train_state(
        policy.params,
        functions.optimizer,
        mesh,
        reference=reference if algorithm.reference_every else None,
    )
    beside = {REFERENCE: reference, **sampled.beside(policy)}
    resident = {PARAMS: policy.params, OPTIMIZER: state.opt_state, FROZEN: frozen, **beside}
    layout = Rows.shared_where(config, mesh)
    found = sampled.programs(policy, resident)

    def asked(name: str, function: Any, role: str, params: Any, rows: Any, times: int) -> Program:
        lower = lambda: function.lower(params, rows)  # noqa: E731
        return Program(name, lower, (role, BATCH), resident, times=times)

    parts = algorithm.num_minibatches
    batch = weights.batch(rows_of(layout, "old_logps", "advantages"), mesh)
    if algorithm.kl_coef > 0 and algorithm.kl_in_reward:
        every = weights.batch(rows_of(layout, "old_logps", num_updates=parts), mesh)
        found.append(
            asked("reference scoring", functions.ref_logps, ref_role, ref_params, every, 1)
        )
    if algorithm.old_logps == "trainer":
        batch = {**batch, "sampler_logps": batch["old_logps"]}
        found.append(asked("old log-probs", functions.logps, PARAMS, whole, batch, parts))
    if algorithm.has_kl_in_loss and not functions.has_joint_reference:
        found.append(
            asked("reference scoring", functions.ref_logps, ref_role, ref_params, batch, parts)
        )
        batch = {**batch, "ref_logps": batch["old_logps"]}
    times = algorithm.num_updates * parts
    step = train_step(functions.step, state, batch, frozen, times=times, beside=beside)
    num_tokens = num_tokens_of(config)
    flops = train_flops(
        policy.model.config, longest_of(config), num_tokens / parts, lora=frozen is not None
    )
    return sampled.iteration(policy, [*found, step.with_flops(flops)])


def ppo(config: PpoConfig, mesh: Mesh, shapes: Shapes, apart: Mesh | None = None) -> Programs:
    """Sampling, rewards, what reference and critic say, advantages, and updates."""
    sampled = Sampled.of(config, mesh, apart, shapes)
    policy = weights.policy(config.model, shapes.of_source(config.model, config), mesh)
    algorithm, frozen, parts = config.algorithm, policy.frozen, config.num_minibatches
    critic, critic_shape, critic_params = _critic(config, policy, mesh, shapes)
    functions = ppo_phase.make_functions(config, policy.model, critic, mesh, frozen)
    params = {"policy": policy.params, critic.name: critic_params}
    roles = {"policy": PARAMS, critic.name: CRITIC}
    extra = Extra(KlControl(jnp.float32(0)), losses.init_moments())
    state = weights.train_state(params, functions.optimizer, mesh, extra=extra)
    beside = {
        PARAMS: policy.params,
        CRITIC: critic_params,
        REFERENCE: policy.params if frozen is None else None,
        **sampled.beside(policy),
    }
    resident = {**beside, OPTIMIZER: state.opt_state, FROZEN: frozen}
    layout = Rows.of(config, mesh)
    own = ["old_logps", *(["sampler_logps"] if algorithm.old_logps == "trainer" else [])]
    every = weights.batch(rows_of(layout, *own, "scores", num_updates=parts), mesh)
    whole = {**params, "policy": policy.whole(policy.params)}
    found = sampled.programs(policy, resident)

    def asked(name: str, function: Any, role: Any, params: Any) -> Program:
        return Program(name, lambda: function.lower(params, every), (role, BATCH), resident)

    if algorithm.old_logps == "trainer":
        found.append(asked("old log-probs", functions.logps, PARAMS, whole["policy"]))
    is_lora = frozen is not None
    reference = asked(
        "reference scoring",
        functions.ref_logps,
        FROZEN if is_lora else REFERENCE,
        frozen if is_lora else policy.params,
    )
    flat = (parts * layout.num_rows, layout.row_len)
    kinds = [*[np.float32] * 4, np.bool_, np.int32]  # As `experience` takes them.
    tokens = {str(i): jax.ShapeDtypeStruct(flat, kind) for i, kind in enumerate(kinds)}
    arrays = weights.batch(tokens, mesh, 0).values()
    kl_coef = weights.replicated(jax.ShapeDtypeStruct((), np.float32), mesh)
    advantages = Program(
        "advantages",
        lambda: functions.experience.lower(*arrays, kl_coef),  # type: ignore[attr-defined]
        (*[BATCH] * len(kinds), OTHER),
        resident,
    )
    step = train_step(
        functions.step,
        state,
        weights.batch(_update(config, layout, own), mesh),
        None if frozen is None else {"policy": frozen},
        roles=STATE._replace(params=roles),
        times=algorithm.num_epochs * parts,
        beside=beside,
    )
    num_tokens, longest = num_tokens_of(config), longest_of(config)
    flops = train_flops(policy.model.config, longest, num_tokens / parts, lora=is_lora)
    if critic_shape is not None:
        flops += train_flops(critic_shape, longest, num_tokens / parts, unembed=False)
    found += [
        reference.with_flops(num_tokens * forward_flops(policy.model.config, longest)),
        asked("critic scoring", functions.values, roles, whole),
        advantages,
        step.with_flops(flops),
    ]
    return sampled.iteration(policy, found)


def _critic(
    config: PpoConfig, policy: weights.Weights, mesh: Mesh, shapes: Shapes
) -> tuple[Any, Any, Any]:
    """What `phases.critic` makes, without weights: a critic, the shape of its own trunk if it has
    one, and its parameters."""
    if config.critic.trunk == "shared":
        shared = CRITICS["shared"](config, policy, mesh)
        head = jax.eval_shape(lambda: shared.init({}, jax.random.PRNGKey(0)))
        return shared, None, weights.replicated(head, mesh)
    path = config.critic.path
    if path is None and not config.critic.from_policy:
        path = next((model.path for model in config.rewards.models.values()), None)
    shape = policy.model.config if path is None else shapes.of(path)
    # All of it trains, under LoRA too.
    source = config.model.model_copy(update={"lora": None, "quantize": None, "adapter": None})
    model, found = weights.scalar(weights.policy(source, shape, mesh), mesh)

    def values(params: Any, batch: Batch, hidden: Any) -> Any:
        return separate_values(model, params[CRITIC], batch)

    return SimpleNamespace(name=CRITIC, values=values), shape, found.params


def rows_of(layout: Rows, *names: str, num_updates: int = 1) -> dict[str, np.ndarray]:
    """Rows of updates as `Rows.pack` lays them out, almost empty, with arrays of these names."""
    one = {"tokens": np.zeros(2, np.int32), "mask": np.array([False, True])}
    one |= {name: np.zeros(2, np.float32) for name in names}
    return layout.pack([one], num_updates)


def _update(config: PpoConfig, layout: Rows, names: list[str]) -> dict[str, np.ndarray]:
    """The rows of an update of PPO, with those of texts where there are any."""
    rows = rows_of(layout, *names, "returns", "advantages", "old_values")
    if config.ptx is None:
        return rows
    shape = layout.num_parts, config.ptx.rows, layout.row_len
    kinds = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "mask": np.bool_}
    return with_texts(rows, {name: np.ones(shape, kind) for name, kind in kinds.items()})
