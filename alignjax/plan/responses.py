"""What phases compile that ask a model for completions, and reward models for scores."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.phases.sample_config import ResponsesConfig
from alignjax.phases.scoring import scored_shape
from alignjax.plan import weights
from alignjax.plan.programs import BATCH, PARAMS, Program, Programs
from alignjax.plan.sampling import sampling
from alignjax.plan.shapes import Shapes
from alignjax.plan.work import forward_flops
from alignjax.rewards.combine import RewardConfig

Scorers = list[tuple[str, Any, Any]]
"""Reward models: name, model and parameters of each."""
NOTES = (
    "prompts and completions are taken to be as long as they may be, one round of sampling to an "
    "iteration, and each token of a row to be a target",
)


def responses(config: ResponsesConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Phases sample and reject: completions of a batch of prompts, and their rewards."""
    limits = config.rollout
    model = weights.loaded(shapes.of(config.model.path), mesh, compute=config.model.compute_dtype)
    scorers, models = reward_models(getattr(config, "rewards", None), mesh, shapes)
    resident = {PARAMS: model.params, **models}
    found = sampling(
        model.model,
        model.params,
        limits,
        mesh,
        resident,
        num_samples=limits.num_samples,
        repetition_penalty=limits.repetition_penalty,
    )
    longest = limits.max_prompt_tokens + limits.max_tokens
    total = limits.num_prompts * limits.num_samples
    found += [scoring(scorer, mesh, resident, longest, total) for scorer in scorers]
    most, notes = config.data.num_prompts, list(NOTES)
    if most is None:
        notes.append("how many prompts there are the data say: one batch of them is counted")
    steps = 1 if most is None else -(-most // limits.num_prompts)
    return Programs(found, float(total * longest), steps, notes)


def reward_models(
    config: RewardConfig | None, mesh: Mesh, shapes: Shapes
) -> tuple[Scorers, dict[str, Any]]:
    """The reward models; and their parameters by their role."""
    found = [
        (name, *weights.reward_model(model, shapes.of(model.path), mesh))
        for name, model in ({} if config is None else config.models).items()
    ]
    return found, {f"reward {name}": params for name, _, params in found}


def scoring(
    scorer: tuple[str, Any, Any], mesh: Mesh, resident: Any, longest: int, num_texts: int
) -> Program:
    """As `phases.scoring.RewardModel` scores so many texts."""
    name, model, params = scorer
    num_rows, row_len = scored_shape(longest, mesh)
    tokens = np.zeros((num_rows, row_len), np.int32)
    rows = weights.batch(dict.fromkeys(("tokens", "segment_ids", "positions"), tokens), mesh, 0)
    return Program(
        f"reward {name}",
        lambda: jax.jit(model.apply).lower(params, *rows.values()),
        (f"reward {name}", BATCH, BATCH, BATCH),
        resident,
        times=-(-num_texts // (num_rows * max(1, row_len // longest))),
        model_flops=num_rows
        * row_len
        * forward_flops(model.decoder.config, row_len, unembed=False),
    )
