"""Judges, answers and critiques: what is compiled is what runs, as often as the config says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from alignjax.phases import judge_model
from alignjax.phases.critique_config import CritiqueConfig
from alignjax.phases.judge_model import ModelAsk
from alignjax.phases.label_config import LabelConfig
from alignjax.plan import judged
from alignjax.plan.phases import PLANNED
from alignjax.plan.programs import NotPlannedError
from alignjax.plan.scorer import Samples
from alignjax.plan.shapes import Shapes
from alignjax.rewards.judge_answer import Question
from alignjax.rewards.judge_config import JudgeConfig
from tests.plan.small import config_of


def judge_of(world, **options):
    local = {"path": str(world / "base"), "chat": False, "batch_size": 16}
    return {"model": local, **options}


def built(kind, values):
    return TypeAdapter(kind).validate_json(json.dumps(values))


def test_a_verdict_is_asked_for_as_planned(world, mesh, monkeypatch):
    """The rows that `ModelAsk` gives its program for a question of that length."""
    monkeypatch.setattr(judged, "TEMPLATE", 0)
    config = built(JudgeConfig, judge_of(world))
    (scorer,) = judged.judge("judge", config, "pairwise", mesh, Shapes())
    (program,) = scorer.programs({}, Samples(1, 2, 20, 30))
    ask = ModelAsk(config.model, None, mesh)
    seen = []

    def logps(params, batch, num_options):
        seen.append((params, batch, num_options))
        return jnp.zeros((len(batch["tokens"]), 1, num_options))

    monkeypatch.setattr(ask, "_logps", logps)
    text = "1" * 79  # 80 tokens and their options, as planned: a row of 128.
    [*ask([Question(text, (" 1", " 2"))])]
    ((params, batch, num_options),) = seen
    infos = program.lower().args_info[0]
    planned, given = jax.tree.leaves(infos), jax.tree.leaves((params, batch))
    assert [(x.shape, x.dtype) for x in planned] == [(x.shape, x.dtype) for x in given]
    assert num_options == 2 and program.times == 1
    assert batch["tokens"].shape == judge_model.asked_shape(80, mesh)


@pytest.mark.parametrize(
    ("options", "method", "times"),
    [
        # 8 prompts of 4 samples: 6 pairs each, in both orders; 128 rows of 128 tokens at a time.
        ({}, "pairwise", 96 / 16),
        ({"both_orders": False}, "pairwise", 48 / 16),
        ({}, "pointwise", 32 / 16),
    ],
)
def test_each_question_is_asked_once(world, mesh, options, method, times):
    config = built(JudgeConfig, judge_of(world, **options))
    (scorer,) = judged.judge("judge", config, method, mesh, Shapes())
    (program,) = scorer.programs({}, Samples(8, 4, 20, 30))
    assert program.times == times
    ranks = program.lower().args_info[0][1]["ranks"]
    assert ranks.shape[-1] == (2 if method == "pairwise" else 10)


def test_a_judge_as_a_reward(world, mesh):
    """Its weights lie beside what trains, and its thoughts are sampled before the verdicts."""
    rewards = {"judges": {"own": judge_of(world, think={"max_tokens": 24})}}
    found = PLANNED["grpo"](config_of(world, "grpo", rewards=rewards), mesh, Shapes())
    programs = {program.name: program for program in found.all}
    assert "judge own" in programs["train step"].resident
    assert programs["judge own: prefill"].times == programs["judge own: verdicts"].times == 2
    assert any("judge own: a question is taken to have 256 tokens" in note for note in found.notes)
    elsewhere = {"judges": {"far": {"http": {"url": "http://localhost:1/v1", "model": "x"}}}}
    found = PLANNED["grpo"](config_of(world, "grpo", rewards=elsewhere), mesh, Shapes())
    assert not any("judge" in program.name for program in found.all)


def sampled(world, **more):
    return {
        "model": {"path": str(world / "base")},
        "data": {
            "train": str(world / "train.jsonl"), "num_prompts": 20,
            "text": {"fields": {"prompt": "prompt"}},
        },
        "rollout": {"num_prompts": 8, "num_samples": 4, "max_prompt_tokens": 20, "max_tokens": 30},
        **more,
    }  # fmt: skip


def test_labels_of_what_is_sampled(world, mesh):
    values = {"phase": "label", "name": "x", "judge": judge_of(world)}
    config = built(LabelConfig, {**values, "sample": sampled(world)})
    found = PLANNED["label"](config, mesh, Shapes())
    names = [program.name for program in found.all]
    assert "prefill" in names and names[-1] == "judge: verdicts"
    assert {*found.all[0].resident} >= {"parameters", "judge"}
    assert found.steps == 3 and found.num_tokens == 8 * 4 * 50
    read = built(LabelConfig, {**values, "responses": "responses.jsonl"})
    with pytest.raises(NotPlannedError, match="phase label of responses that are read"):
        PLANNED["label"](read, mesh, Shapes())


def test_critiques_and_revisions(world, mesh):
    """Of 4 answers to each of 4 prompts, twice."""
    values = sampled(world) | {
        "phase": "critique", "name": "x", "template": "critique_text", "num_rounds": 2,
        "rollout": {
            "num_prompts": 4, "num_samples": 4, "max_prompt_tokens": 20,
            "response": {"max_tokens": 10}, "critique": {"max_tokens": 12},
            "revision": {"max_tokens": 14},
        },
    }  # fmt: skip
    found = PLANNED["critique"](built(CritiqueConfig, values), mesh, Shapes())
    programs = {program.name: program for program in found.all}
    times = {
        name: programs[f"{name}: prefill"].times / programs["response: prefill"].times
        for name in ("critique", "revision")
    }
    assert found.steps == 5
    # What asks is longer than the context of 128: as much as leaves room for an answer.
    assert found.num_tokens == 16 * (20 + 10 + 2 * 128 + 2 * 128)
    assert times == {"critique": 2, "revision": 2}
    assert np.all([program.times > 0 for program in found.all])
