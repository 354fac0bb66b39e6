"""Weights that sample in another layout, or elsewhere: the same samples, and no copy that stays."""

import gc

import jax
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig, save
from alignjax.text import load_tokenizer
from tests.phases import rl
from tests.phases.rl import FakeEngine, iterations, make, write_world

SHAPE = {
    "family": "qwen3", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = Model(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size))
    params = jax.jit(model.init)(jax.random.PRNGKey(0))
    save(folder / "base", model, params, extra_config={"eos_token_id": tokenizer.eos_id})
    tokenizer.save(str(folder / "base"))
    return folder


def moving(world):
    """A loss that is not 0 by construction: weights have moved since sampling, and not so far that
    rounding would grow."""
    return {
        "model": {"path": str(world / "base")}, "optimizer": {"learning_rate": 3e-3},
        "algorithm": {"kl_coef": 0.0, "num_updates": 2, "num_minibatches": 2},
    }  # fmt: skip


def live_bytes():
    """Of the buffers that any array holds, each once."""
    gc.collect()
    shards = (shard.data for array in jax.live_arrays() for shard in array.addressable_shards)
    return sum({one.unsafe_buffer_pointer(): one.nbytes for one in shards}.values())


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_weights_in_another_layout_are_there_while_they_sample_and_no_longer(
    world, monkeypatch, lora
):
    seen = {}

    class Watching(FakeEngine):
        def __call__(self, params, *args):
            seen["sampling"] = live_bytes()
            seen["specs"] = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(params)}
            seen["copy"] = sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(params)
                for shard in leaf.addressable_shards
            )
            return super().__call__(params, *args)

    Watching().put_in(monkeypatch)

    def scores(samples):
        seen["scoring"] = live_bytes()
        return rl.share_of_sevens(samples)

    model = {"path": str(world / "base")} | ({} if lora is None else {"lora": lora})
    phase = make(
        monkeypatch, world, model=model, mesh={"fsdp": 2}, rollout={"mesh": {"tensor": 2}}
    )  # fmt: skip
    monkeypatch.setattr(phase._sampler, "rewards", scores)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    before = live_bytes()
    state, _ = phase.collect(state, records)
    assert any("tensor" in spec for spec in seen["specs"]), seen["specs"]
    # Arrays that lie as they should are not copied: norms, which are whole everywhere.
    assert 0.8 * seen["copy"] < seen["sampling"] - before <= seen["copy"]
    for moment in (seen["scoring"], live_bytes()):
        assert moment - before < 0.01 * seen["copy"]


def test_where_they_train_no_weight_is_copied(world, monkeypatch):
    seen = []
    monkeypatch.setattr(
        rl.rollouts, "make_generate", lambda model, **_: lambda params, *args: seen.append(params)
    )
    phase = make(monkeypatch, world)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    with pytest.raises(AttributeError):
        phase.collect(state, records)
    assert seen[0] is state.params


@pytest.fixture(scope="module")
def on_the_training_mesh(world):
    with pytest.MonkeyPatch.context() as patch:
        phase = make(patch, world, num_devices=8, mesh={"fsdp": 8}, **moving(world))
        return iterations(phase, 3)


def assert_same(found, expected):
    """The same samples; log-probs to 1e-5, losses to 1e-5 relative."""
    for (metrics, batches, updates), (metrics_, batches_, updates_) in zip(
        found[1], expected[1], strict=True
    ):
        known = {name: value for name, value in metrics.items() if "staleness" not in name}
        assert known == pytest.approx(metrics_, rel=1e-6)
        for batch, batch_ in zip(batches, batches_, strict=True):
            np.testing.assert_array_equal(batch["tokens"], batch_["tokens"])
            np.testing.assert_allclose(batch["old_logps"], batch_["old_logps"], atol=1e-5)
        for one, other in zip(updates, updates_, strict=True):
            assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5, abs=1e-7)
        assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5
        assert max(abs(float(update["loss"])) for update in updates) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "rollout",
    [
        {"mesh": {"data": 4, "tensor": 2}},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
        {"devices": 4, "mesh": {"data": 2, "tensor": 2}},
        {"devices": 6, "mesh": {"data": 3, "tensor": 2}},
    ],
    ids=str,
)
def test_another_layout_samples_the_same(world, monkeypatch, on_the_training_mesh, rollout):
    num_left = 8 - rollout.get("devices", 0)
    phase = make(
        monkeypatch, world, num_devices=8, mesh={"fsdp": num_left}, rollout=rollout, **moving(world)
    )  # fmt: skip
    assert_same(iterations(phase, 3), on_the_training_mesh)
    phase.close()


def test_another_layout_samples_what_is_trained(world, monkeypatch):
    """As the weights change: to 1e-5 of the log-probs of the trainer."""
    phase = make(
        monkeypatch, world, mesh={"fsdp": 2}, rollout={"mesh": {"tensor": 2}},
        model={"path": str(world / "base")},
    )  # fmt: skip
    for *_, (update,) in iterations(phase, 2)[1]:
        assert 0 < float(update["sampling/sampling_logp_difference/max"]) < 1e-5


LORA = {"lora": {"rank": 4, "alpha": 8.0}}


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["grpo", "ppo", "online_preference"])
@pytest.mark.parametrize("model", [LORA, LORA | {"quantize": "int8"}], ids=["lora", "int8"])
@pytest.mark.parametrize("rollout", [{"mesh": {"tensor": 2}}, {"devices": 2}], ids=str)
def test_adapters_and_codes_move_too(world, monkeypatch, phase, model, rollout):
    """To where they sample what the trainer's log-probs say, as its weights change."""
    num_devices = 2 + rollout.get("devices", 0)
    more = {"losses": {"dpo": {}}} if phase == "online_preference" else {}
    made = make(
        monkeypatch, world, phase, num_devices=num_devices, mesh={"fsdp": 2}, rollout=rollout,
        model={"path": str(world / "base"), **model}, **more,
    )  # fmt: skip
    _, seen = iterations(made, 3)
    made.close()
    for metrics, batches, updates in seen:
        assert batches and metrics["reward"] >= 0
        if phase != "online_preference":  # Which has no ratio to what has sampled.
            assert float(updates[0]["sampling/sampling_logp_difference/max"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{"mesh": {"tensor": 2}}, {"devices": 2}], ids=str)
def test_int8_rollouts_in_another_layout(world, monkeypatch, rollout):
    """The codes are made where they sample, of what was trained last."""
    made = make(
        monkeypatch, world, num_devices=2 + rollout.get("devices", 0), mesh={"fsdp": 2},
        rollout=rollout | {"int8_weights": True, "int8_kv": True},
        model={"path": str(world / "base")},
    )  # fmt: skip
    _, seen = iterations(made, 3)
    made.close()
    for *_, updates in seen:
        assert 1e-4 < float(updates[0]["sampling/sampling_logp_difference/mean"]) < 0.05
