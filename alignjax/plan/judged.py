"""What is compiled of a judge that is a model of our own; others take no device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.data import Element
from alignjax.data.comparison_rows import pack_elements
from alignjax.phases.judge_model import ARRAYS, asked_shape, option_logps
from alignjax.plan import weights
from alignjax.plan.programs import BATCH, Program
from alignjax.plan.sampling import sampling
from alignjax.plan.scorer import Samples, Scorer
from alignjax.plan.shapes import Shapes
from alignjax.plan.work import forward_flops
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.sharding import batch_shards

TEMPLATE = 256
"""Tokens that a template adds to the texts in a question, by assumption: there is no tokenizer."""


def judge(
    role: str,
    config: JudgeConfig,
    method: Literal["pairwise", "pointwise"],
    mesh: Mesh,
    shapes: Shapes,
) -> list[Scorer]:
    """The judge, as `phases.judge_model.ModelAsk` answers; none if it is an endpoint or a function.

    Args:
      role: of its parameters.
      method: whether it is asked of each two samples of a prompt, or of each sample.
    """
    local = config.model
    if local is None:
        return []
    found = weights.loaded(
        shapes.of(local.path), mesh, compute=local.compute_dtype, param_dtype=local.param_dtype
    )
    model, params, think = found.model, found.params, config.think
    num_options, num_texts = (2, 2) if method == "pairwise" else (config.best_score, 1)

    def programs(resident: Mapping[str, Any], samples: Samples) -> list[Program]:
        number = samples.total
        if method == "pairwise":
            pairs = samples.num_samples * (samples.num_samples - 1) // 2
            number = samples.num_prompts * pairs * (2 if config.both_orders else 1)
        own = 0 if think is None else think.max_tokens
        asked = min(
            TEMPLATE + samples.prompt_len + num_texts * samples.completion_len,
            model.config.max_position_embeddings - own,
        )
        at_once, batches = min(local.batch_size, number), -(-number // local.batch_size)
        found: list[Program] = []
        if think is not None:
            limits = SimpleNamespace(
                num_prompts=at_once, max_prompt_tokens=asked, max_tokens=think.max_tokens,
                max_rows=local.batch_size, temperature=local.temperature, int8_kv=False,
                int8_weights=False,
            )  # fmt: skip
            thoughts = sampling(model, params, limits, mesh, resident, num_samples=1, role=role)
            found += [one.called(role, batches) for one in thoughts]
        num_rows, row_len = asked_shape(asked + own, mesh)
        ids = np.zeros(1, np.int32)
        rows = pack_elements(
            [Element(ids, (ids,) * num_options, (1,) * num_options)],
            num_rows=num_rows, row_len=row_len, num_responses=num_options, shared_prompt=True,
            packed=False,
        )  # fmt: skip
        batch = weights.batch({name: rows[name] for name in ARRAYS}, mesh, 0)
        logps = jax.jit(
            functools.partial(option_logps, model, batch_shards(mesh)),
            static_argnames="num_options",
        )
        verdicts = Program(
            f"{role}: verdicts",
            lambda: logps.lower(params, batch, num_options=num_options),
            (role, BATCH),
            resident,
            times=batches * -(-at_once // num_rows),
            model_flops=num_rows * row_len * forward_flops(model.config, row_len),
        )
        return [*found, verdicts]

    note = (
        f"{role}: a question is taken to have {TEMPLATE} tokens besides the texts that are judged, "
        "and to be asked once"
    )
    return [Scorer(role, params, programs, (note,))]
