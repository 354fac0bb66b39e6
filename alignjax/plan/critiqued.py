"""What the phase compiles in which a model criticises and revises its own answers."""

from __future__ import annotations

from types import SimpleNamespace

from jax.sharding import Mesh

from alignjax.phases.critique_config import CritiqueConfig
from alignjax.plan import weights
from alignjax.plan.judged import TEMPLATE
from alignjax.plan.programs import PARAMS, Program, Programs
from alignjax.plan.responses import NOTES, batches
from alignjax.plan.sampling import sampling
from alignjax.plan.shapes import Shapes
from alignjax.rewards.critique_template import load_critique_template


def critique(config: CritiqueConfig, mesh: Mesh, shapes: Shapes) -> Programs:
    """Answers to a batch of prompts, and all rounds of critiques and revisions."""
    steps, source = config.rollout, config.model
    model = weights.loaded(shapes.of(source.path), mesh, compute=source.compute_dtype)
    found: list[Program] = []
    num_tokens = 0

    def add(name: str, num_prompts: int, num_samples: int, longest: int, rounds: int) -> None:
        nonlocal num_tokens
        step = getattr(steps, name)
        # What does not fit into the context is not asked.
        asked = min(longest, model.model.config.max_position_embeddings - step.max_tokens)
        limits = SimpleNamespace(
            num_prompts=num_prompts, max_prompt_tokens=asked, max_tokens=step.max_tokens,
            max_rows=steps.max_rows, temperature=step.temperature, int8_kv=False,
            int8_weights=False,
        )  # fmt: skip
        resident = {PARAMS: model.params}
        programs = sampling(
            model.model, model.params, limits, mesh, resident, num_samples=num_samples
        )
        found.extend(one.called(name, rounds) for one in programs)
        num_tokens += rounds * num_prompts * num_samples * (asked + step.max_tokens)

    add("response", steps.num_prompts, steps.num_samples, steps.max_prompt_tokens, 1)
    total = steps.num_prompts * steps.num_samples
    longest = max(steps.response.max_tokens, steps.revision.max_tokens)
    longest += steps.max_prompt_tokens + TEMPLATE
    if load_critique_template(config.template).critique is not None:
        add("critique", total, 1, longest, config.num_rounds)
        longest += steps.critique.max_tokens + TEMPLATE
    add("revision", total, 1, longest, config.num_rounds)
    number, more = batches(config.data.num_prompts, steps.num_prompts)
    note = f"what asks for a critique or a revision is taken to have {TEMPLATE} tokens of its own"
    return Programs(found, float(num_tokens), number, [*NOTES, note, *more])
