"""What phases compile that ask a model for completions, and what scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.phases.label_config import LabelConfig
from alignjax.phases.sample_config import ResponsesConfig, ResponsesSource
from alignjax.phases.scoring import scored_shape
from alignjax.plan import weights
from alignjax.plan.judged import judge
from alignjax.plan.programs import BATCH, PARAMS, NotPlannedError, Program, Programs
from alignjax.plan.sampling import sampling
from alignjax.plan.scorer import Samples, Scorer
from alignjax.plan.shapes import Shapes
from alignjax.plan.work import forward_flops
from alignjax.rewards.combine import RewardConfig

NOTES = (
    "prompts and completions are taken to be as long as they may be, one round of sampling to an "
    "iteration, and each token of a row to be a target",
)


def responses(config: ResponsesConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Phases sample and reject: completions of a batch of prompts, and their rewards."""
    rewards = getattr(config, "rewards", None)
    return _responses(config, scorers_of(rewards, mesh, shapes), mesh, shapes)


def label(config: LabelConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Completions of a batch of prompts, and what a judge says of them.

    Raises:
      NotPlannedError: if they are not sampled, but read.
    """
    if config.sample is None:
        raise NotPlannedError(
            "phase label of responses that are read: how many there are, and how long, only the "
            "file says; what is sampled (label.sample) can be planned"
        )
    found = judge("judge", config.judge, config.method, mesh, shapes)
    return _responses(config.sample, found, mesh, shapes)


def _responses(
    config: ResponsesSource, scorers: Sequence[Scorer], mesh: Mesh, shapes: Shapes
) -> Programs:
    limits = config.rollout
    model = weights.loaded(shapes.of(config.model.path), mesh, compute=config.model.compute_dtype)
    resident = {PARAMS: model.params, **{one.role: one.params for one in scorers}}
    found = sampling(
        model.model,
        model.params,
        limits,
        mesh,
        resident,
        num_samples=limits.num_samples,
        repetition_penalty=limits.repetition_penalty,
    )
    samples = Samples.of(limits, limits.num_samples)
    for one in scorers:
        found += one.programs(resident, samples)
    notes = [*NOTES, *(note for one in scorers for note in one.notes)]
    steps, more = batches(config.data.num_prompts, limits.num_prompts)
    return Programs(found, float(samples.total * samples.longest), steps, [*notes, *more])


def batches(num_prompts: int | None, at_once: int) -> tuple[int, list[str]]:
    """How many batches so many prompts are, with a note where only the data say how many."""
    if num_prompts is not None:
        return -(-num_prompts // at_once), []
    return 1, ["how many prompts there are the data say: one batch of them is counted"]


def scorers_of(config: RewardConfig | None, mesh: Mesh, shapes: Shapes) -> list[Scorer]:
    """The reward models, and the judges that are models: what scores on devices."""
    if config is None:
        return []
    found = [
        _reward(name, *weights.reward_model(model, shapes.of(model.path), mesh), mesh)
        for name, model in config.models.items()
    ]
    for name, one in config.judges.items():
        found += judge(f"judge {name}", one, one.method, mesh, shapes)
    return found


def _reward(name: str, model: Any, params: Any, mesh: Mesh) -> Scorer:
    """As `phases.scoring.RewardModel` scores texts."""
    role = f"reward {name}"

    def programs(resident: Any, samples: Samples) -> list[Program]:
        num_rows, row_len = scored_shape(samples.longest, mesh)
        tokens = np.zeros((num_rows, row_len), np.int32)
        rows = weights.batch(dict.fromkeys(("tokens", "segment_ids", "positions"), tokens), mesh, 0)
        one = Program(
            role,
            lambda: jax.jit(model.apply).lower(params, *rows.values()),
            (role, BATCH, BATCH, BATCH),
            resident,
            times=-(-samples.total // (num_rows * max(1, row_len // samples.longest))),
            model_flops=num_rows
            * row_len
            * forward_flops(model.decoder.config, row_len, unembed=False),
        )
        return [one]

    return Scorer(role, params, programs)
