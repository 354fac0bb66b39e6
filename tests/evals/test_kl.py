"""The KL between two models, on what one of them sampled."""

import json

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.core.intervals import Z95, mean_by_row
from alignjax.evals.run import EvalConfig, evaluate
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.scoring import Rewards
from alignjax.text import vocab_tokenizer
from tests import alone

TOKENS = ["<pad>", "<bos>", "<eos>", *"abcd"]
LENGTH = {"function": "format.length", "args": {"max_tokens": 4}}
SHAPE = ModelConfig(
    vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32,
    max_position_embeddings=16, initializer_range=0.4,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    for seed, name in enumerate(["policy", "reference"]):
        model = Model(SHAPE)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        save(folder / name, model, model.init(jax.random.key(seed)), extra_config=ids)
        vocab_tokenizer(TOKENS).save(str(folder / name))
    with (folder / "prompts.jsonl").open("w") as file:
        for q in ["a", "bc", "", "abd", "d", "dd"]:
            print(json.dumps({"q": q}), file=file)
    return folder


def config(root, **more):
    return EvalConfig.model_validate(
        {
            "model": str(root / "policy"),
            "data": str(root / "prompts.jsonl"),
            "text": {"fields": {"prompt": "q"}},
            "rewards": {"functions": {"len": LENGTH}, "num_workers": 1},
            "correct": None,
            "num_samples": 5,
            "max_prompt_tokens": 8,
            "max_tokens": 6,
            "reference": str(root / "reference"),
            **more,
        }
    )


def logp(model, params, sample):
    """Of a completion in a row of its own, token by token."""
    ids = np.concatenate([sample.prompt_ids, sample.completion_ids])
    every = alone.logps(model, params, 1.0, *alone.rows(ids, width=16))
    logps = np.asarray(every, np.float64)[0]
    return sum(logps[t - 1, ids[t]] for t in range(len(sample.prompt_ids), ids.size))


def test_it_is_the_mean_log_ratio_of_what_was_sampled(root):
    found = evaluate(config(root), Rewards)
    model = Model(SHAPE)
    params = [model.init(jax.random.key(seed)) for seed in (0, 1)]
    ratios = [logp(model, params[0], s) - logp(model, params[1], s) for s in found.rollouts.samples]
    rows = np.reshape(ratios, (6, 5)).mean(1)
    assert found.kl.mean == pytest.approx(rows.mean(), abs=1e-4)
    assert found.kl.mean > 0.5, "they are two models"
    half = Z95 * rows.std(ddof=1) / np.sqrt(6)
    assert found.kl.low == pytest.approx(rows.mean() - half, abs=1e-4)
    assert found.kl.high == pytest.approx(rows.mean() + half, abs=1e-4)
    assert found.estimates == {}, "no answer is right or wrong"
    figures = found.as_json()
    assert figures["kl"]["mean"] == found.kl.mean
    assert figures["reward"] == figures["reward_interval"]["mean"]


def test_a_model_has_not_moved_from_itself(root):
    found = evaluate(config(root, reference=str(root / "policy")), Rewards)
    assert found.kl.mean == pytest.approx(0, abs=1e-5)
    assert evaluate(config(root, reference=None), Rewards).kl is None


def test_faults(root, tmp_path):
    with pytest.raises(ValidationError, match=r"temperature=0\.5, top_k=0, top_p=1\.0 it is of"):
        config(root, temperature=0.5)
    small = Model(SHAPE.model_copy(update={"vocab_size": 3}))
    save(tmp_path, small, small.init(jax.random.key(0)), extra_config={"eos_token_id": 2})
    with pytest.raises(UserError, match=r"its vocabulary of 3 has no token \d, which was sampled"):
        evaluate(config(root, reference=str(tmp_path)), Rewards)


def test_means_by_row():
    values = np.array([[1.0, 3.0], [4.0, np.nan], [np.nan, np.nan], [0.0, 0.0]])
    found = mean_by_row(values)  # Of rows: 2, 4 and 0.
    half = Z95 * 2 / np.sqrt(3)
    assert tuple(found) == pytest.approx((2, 2 - half, 2 + half))
    assert str(found) == f"2.000 [{2 - half:.3f}, {2 + half:.3f}]"
    alone = mean_by_row(values[:1])
    assert alone.as_json() == {"mean": 2.0, "low": None, "high": None}
    assert mean_by_row(values[2:3]).as_json()["mean"] is None
