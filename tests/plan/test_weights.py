"""What is planned for lies as what is loaded and trained: leaf by leaf, with nothing loaded."""

import jax
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig, load_reward, save, save_reward
from alignjax.models.heads import ScalarModel
from alignjax.phases.common import Policy
from alignjax.phases.reward_model import RewardModel
from alignjax.phases.sft import SftConfig
from alignjax.plan import weights
from alignjax.rewards.combine import RewardModelConfig
from alignjax.sharding import MeshConfig, make_mesh, put_batch
from alignjax.text import vocab_tokenizer
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.state import create_state

SHAPE = ModelConfig(
    vocab_size=16, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=32,
    max_position_embeddings=64,
)  # fmt: skip
LORA = {"rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = vocab_tokenizer(["<pad>", "<bos>", "<eos>", *"abcdefghijklm"])
    model = Model(SHAPE)
    save(folder / "base", model, model.init(jax.random.key(0)))
    scorer = ScalarModel(model)
    ids = {"pad_token_id": 0}
    save_reward(folder / "reward", scorer, scorer.init(jax.random.key(0)), extra_config=ids)
    for name in ("base", "reward"):
        tokenizer.save(str(folder / name))
    return folder


def config(folder, **model):
    return SftConfig.model_validate({
        "phase": "sft", "name": "x", "tokenizer": str(folder / "base"), "model": model,
        "data": {"train": "x.jsonl", "text": {"fields": {"completion": "text"}}},
    })  # fmt: skip


def assert_same(planned, real):
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for (path, plan), array in zip(
        jax.tree_util.tree_leaves_with_path(planned), jax.tree.leaves(real), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (plan.shape, plan.dtype) == (array.shape, array.dtype), where
        assert plan.sharding.is_equivalent_to(array.sharding, array.ndim), where


@pytest.mark.parametrize(
    "model",
    [
        {"init": {**SHAPE.model_dump(exclude={"vocab_size"}, exclude_none=True)}},
        {"path": "base", "param_dtype": "bfloat16"},
        {"path": "base", "lora": LORA},
        pytest.param(
            {"path": "base", "lora": LORA | {"dora": True}, "quantize": "int8"},
            marks=pytest.mark.slow,
        ),
        {"path": "base", "lora": LORA, "quantize": "nf4", "param_dtype": "bfloat16"},
    ],
    ids=["new", "bfloat16", "lora", "int8", "nf4"],
)
def test_a_policy(folder, mesh, model):
    if "path" in model:
        model = {**model, "path": str(folder / model["path"])}
    given = config(folder, **model)
    real = Policy(given, mesh)
    planned = weights.policy(given.model, SHAPE, mesh)
    assert planned.model == real.model
    params = real.init(jax.random.PRNGKey(0))
    assert_same(planned.params, params)
    assert_same(planned.frozen, real.frozen)


def test_models_with_a_head(folder, mesh):
    given = config(folder, path=str(folder / "base"), lora=LORA)
    real = RewardModel(given, mesh)
    model, planned = weights.scalar(weights.policy(given.model, SHAPE, mesh), mesh)
    assert model == real.model
    assert_same(planned.params, real.init(jax.random.PRNGKey(0)))
    assert_same(planned.frozen, real.frozen)
    path = str(folder / "reward")
    model, params = weights.reward_model(RewardModelConfig(path=path), SHAPE, mesh)
    loaded_model, loaded = load_reward(path, mesh=mesh)
    assert model == loaded_model
    assert_same(params, loaded)


@pytest.mark.parametrize(
    "optimizer",
    [
        {}, {"moments": "int8"}, {"name": "adafactor"}, {"name": "muon", "moments": "bfloat16"},
        {"name": "schedule_free"},
    ],
    ids=lambda options: "-".join(options.values()) or "adamw",
)  # fmt: skip
def test_a_state(folder, mesh, optimizer):
    planned = weights.policy(config(folder, path="base").model, SHAPE, mesh).params
    real = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), planned)
    made = make_optimizer(OptimizerConfig(**optimizer), 10)
    state = create_state(real, made.transform, jax.random.PRNGKey(0))
    assert_same(weights.train_state(planned, made, mesh), state)


def test_a_batch(mesh):
    arrays = {"tokens": np.zeros((2, 4, 8), np.int32), "kl": np.zeros(2, np.float32)}
    assert_same(weights.batch(arrays, mesh), put_batch(arrays, mesh, 1))
