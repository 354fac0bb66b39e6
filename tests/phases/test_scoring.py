"""Rewards of functions and of reward models: what is scored where, normalised, joined, refused."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.core.types import Sample, Score
from alignjax.models import Model, ModelConfig, ScalarModel, save_reward
from alignjax.phases import scoring
from alignjax.phases.scoring import Rewards
from alignjax.rewards.combine import RewardConfig, add_models
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import vocab_tokenizer
from tests import alone

TOKENS = ["<pad>", "<bos>", "<eos>", *"abcdefghij"]
TOKENIZER = vocab_tokenizer(TOKENS)
SHAPE = ModelConfig(
    vocab_size=len(TOKENS), hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32,
    max_position_embeddings=80, initializer_range=0.3,
)  # fmt: skip


def write_model(folder, *, tokenizer=TOKENIZER, moments=None, seed=0, spoil=False):
    model = ScalarModel(Model(SHAPE))
    params = model.init(jax.random.key(seed))
    if spoil:
        params["head"]["kernel"] = params["head"]["kernel"] * np.nan
    save_reward(folder, model, params, extra_config={"pad_token_id": tokenizer.pad_id})
    tokenizer.save(str(folder))
    if moments is not None:
        (folder / "reward.json").write_text(json.dumps(moments))
    return model, params


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    model, params = write_model(folder, moments={"mean": 0.5, "std": 2.0, "num": 7})
    return folder, model, params


def mesh_of(devices=1):
    return make_mesh(MeshConfig(data=devices), jax.devices()[:devices])


def samples(num=40, longest=70, seed=0):
    """Ids whose text says nothing of them: pads and eos in the middle, too."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        prompt, completion = (
            rng.integers(0, len(TOKENS), rng.integers(1, longest // 2 + 1), dtype=np.int32)
            for _ in range(2)
        )
        found.append(Sample("p", "c", prompt_ids=prompt, completion_ids=completion))
    return found


def score_of(model, params, sample):
    """Of one text in a row of its own, in float64 NumPy of its value."""
    ids = np.concatenate([sample.prompt_ids, sample.completion_ids])
    values = alone.values(model, params, *alone.rows(ids, width=80))
    return float(np.asarray(values, np.float64)[0, ids.size - 1])


def config(folder, **more):
    return RewardConfig(models={"rm": {"path": str(folder), **more}})


@pytest.mark.parametrize("devices", [1, 8])
def test_a_score_is_that_of_the_last_sampled_id_however_texts_are_packed(
    world, devices, monkeypatch
):
    folder, model, params = world
    monkeypatch.setattr(scoring, "_ROW_TOKENS", 256)  # Several calls.
    with Rewards(config(folder), TOKENIZER, mesh_of(devices)) as rewards:
        given = samples()
        found = rewards(given)
    assert len(found) == len(given)
    for sample, score in zip(given, found, strict=True):
        expected = (score_of(model, params, sample) - 0.5) / 2.0
        assert score.value == pytest.approx(expected, abs=2e-6)
        assert score.parts == {"rm": score.value} and score.error is None
    assert np.std([s.value for s in found]) > 0.1, "texts differ"


def test_the_number_of_texts_compiles_nothing_and_their_length_little(world):
    rewards = Rewards(config(world[0]), TOKENIZER, mesh_of())
    for num in (3, 50, 1):
        rewards(samples(num, longest=20))
    assert rewards._models["rm"]._apply._cache_size() == 1
    long = Sample(
        "p", "c", prompt_ids=np.full(60, 3, np.int32), completion_ids=np.full(9, 4, np.int32)
    )
    rewards([long])
    assert rewards._models["rm"]._apply._cache_size() == 2


def test_explicit_moments_and_weights_and_functions_add_up(world, monkeypatch):
    folder, model, params = world
    given = samples(4)
    pooled = [Score(1.0, {"f": 4.0}), Score(-1.0, {"f": -4.0}), Score(None, error="no"), Score(0.0)]
    monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: lambda _: pooled)
    both = RewardConfig(
        functions={"f": {"function": "verify.exact", "weight": 0.25}},
        models={"rm": {"path": str(folder), "weight": -3.0, "mean": 1.0, "std": 4.0}},
    )
    found = Rewards(both, TOKENIZER, mesh_of())(given)
    values = [(score_of(model, params, s) - 1.0) / 4.0 for s in given]
    for i, base in ((0, 1.0), (1, -1.0), (3, 0.0)):
        assert found[i].value == pytest.approx(base - 3.0 * values[i], abs=1e-5)
    assert found[0].parts == pytest.approx({"f": 4.0, "rm": values[0]}, abs=1e-5)
    assert (found[2].value, found[2].error) == (None, "no")
    assert both.weights == {"f": 0.25, "rm": -3.0}


def test_a_model_without_moments_is_taken_as_it_is_with_a_warning(tmp_path):
    model, params = write_model(tmp_path)
    rewards = Rewards(config(tmp_path), TOKENIZER, mesh_of())
    (warning,) = rewards.warnings
    assert "has no reward.json" in warning and "give mean and std" in warning
    (given,) = samples(1)
    assert rewards([given])[0].value == pytest.approx(score_of(model, params, given), abs=1e-6)
    assert Rewards(config(tmp_path, mean=0.0, std=1.0), TOKENIZER, mesh_of()).warnings == []


def test_a_score_that_is_nan_is_a_failed_reward(tmp_path):
    write_model(tmp_path, spoil=True)
    scores = Rewards(config(tmp_path), TOKENIZER, mesh_of())(samples(3))
    assert [s.value for s in scores] == [None] * 3
    assert scores[0].error.startswith(f"reward model 'rm' ({tmp_path}): the score is nan; prompt")


def test_a_text_that_does_not_fit_fails_alone(world):
    folder, model, params = world
    short, long = samples(1)[0], Sample("p", "c", prompt_ids=np.full(60, 3, np.int32),
                                        completion_ids=np.full(21, 4, np.int32))  # fmt: skip
    first, second = Rewards(config(folder), TOKENIZER, mesh_of())([long, short])
    assert "81 tokens do not fit into its context of 80" in first.error and first.value is None
    assert second.value == pytest.approx((score_of(model, params, short) - 0.5) / 2, abs=2e-6)
    with pytest.raises(UserError, match=r"reward model 'rm' .* up to 81 tokens, but its context"):
        Rewards(config(folder), TOKENIZER, mesh_of(), max_tokens=81)


def test_another_tokenizer_is_refused(world, tmp_path):
    other = vocab_tokenizer([*TOKENS[:3], *"bacdefghij"])
    with pytest.raises(
        UserError,
        match=r"rewards.models.rm.path: .* another tokenizer than the po"
        r"licy: 'b' is 4 there and 3 here|'a' is 3 there and 4",
    ):
        Rewards(config(world[0]), other, mesh_of())
    more = vocab_tokenizer([*TOKENS, "k"])
    with pytest.raises(UserError, match=r"'k' is no token there and 13 here"):
        Rewards(config(world[0]), more, mesh_of())


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"mean": 0.0}, "reward.json: expected numbers mean and std"),
        ({"mean": 0.0, "std": 0.0}, "reward.json: mean=0.0, std=0.0: expected a finite mean"),
        ({"mean": "x", "std": 1.0}, "reward.json: expected numbers mean and std"),
    ],
)
def test_moments_that_are_none(tmp_path, moments, message):
    write_model(tmp_path, moments=moments)
    with pytest.raises(UserError, match=message):
        Rewards(config(tmp_path), TOKENIZER, mesh_of())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "at least one of functions, models and judges"),
        ({"models": {"a": {"path": "x", "mean": 1.0}}}, "give both, or neither"),
        ({"models": {"a": {"path": "x", "mean": 1.0, "std": 0.0}}}, "greater than 0"),
        (
            {"models": {"a": {"path": "x"}}, "functions": {"a": {"function": "verify.exact"}}},
            "'a' stands in functions and in models",
        ),
    ],
)
def test_configs_that_make_no_sense(bad, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig.model_validate(bad)


def test_sums_that_overflow_fail():
    given = RewardConfig(models={"a": {"path": "x", "weight": 1e30}})
    score = add_models(given, Score(0.0), {"a": Score(1e30)})
    assert score.value is None and "which no float32 holds" in score.error
    assert math.isclose(add_models(given, Score(1.0), {"a": Score(2e-30)}).value, 3.0)


def test_a_sample_without_ids_is_a_mistake_of_the_caller(world):
    with pytest.raises(ValueError, match="this Sample has none"):
        Rewards(config(world[0]), TOKENIZER, mesh_of())([Sample("p", "c")])


def test_a_model_scores_the_prompts_of_its_where_and_squashes_what_is_normalised(world):
    folder, model, params = world
    given = [
        dataclasses.replace(sample, fields={"kind": kind})
        for sample, kind in zip(samples(4), ["chat", "sum", "chat", "poem"], strict=True)
    ]
    given.append(dataclasses.replace(given[0], fields={}))
    chat, raw = {"kind": "chat"}, {"path": str(folder), "mean": 0.25, "std": 0.5}
    both = RewardConfig.model_validate(
        {
            "models": {
                "liked": raw | {"weight": 3.0, "squash": "sigmoid", "where": chat},
                "seen": raw | {"weight": 0.0, "where": chat},
                "other": raw | {"weight": 5.0, "where": {"kind": "sum"}},
            }
        }
    )
    found = Rewards(both, TOKENIZER, mesh_of())(given)
    z = [(score_of(model, params, sample) - 0.25) / 0.5 for sample in given]
    for i in (0, 2):
        sigmoid = 1 / (1 + math.exp(-z[i]))
        assert found[i].value == pytest.approx(3 * sigmoid, abs=1e-5)
        assert found[i].parts == pytest.approx({"liked": sigmoid, "seen": z[i]}, abs=1e-5)
    assert found[1].value == pytest.approx(5 * z[1], abs=1e-4) and set(found[1].parts) == {"other"}
    assert found[3].value is None and found[3].error.startswith("no reward is for \"kind='poem'\"")
    assert "reward 'liked': where: the record has no field 'kind'" in found[4].error
    assert [scoring._sigmoid(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]
