"""Phases with adapters: what trains, what stays, what is kept, exported and refused."""

import contextlib
import gc
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.core.types import Score
from alignjax.models import Model, ModelConfig, load, lora, save
from alignjax.models.quantize import num_bytes
from alignjax.phases import scoring
from alignjax.phases.common import ModelSource
from alignjax.phases.grpo import Grpo
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.phases.sft import Sft, SftConfig
from alignjax.recipes import chains
from alignjax.recipes.stage import export_checkpoint, run_phase
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.optim import OptimizerConfig

SHAPE = ModelConfig(
    vocab_size=23, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
    rope_theta=100.0, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    chains.write(folder, seed=0, num_questions=600, num_drills=200, num_train=40, num_test=8)
    lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:700]))
    (folder / "held_out.jsonl").write_text("".join(lines[700:]))
    save(folder / "base", Model(SHAPE), Model(SHAPE).init(jax.random.key(0)))
    return folder


def common(world, **model):
    return {
        "name": "run", "tokenizer": str(world / "tokenizer"),
        "model": {"path": str(world / "base"), "lora": LORA, **model},
    }  # fmt: skip


def sft_values(world, **changes):
    return {
        "phase": "sft", **common(world, **changes.pop("model", {})),
        "data": {
            "train": str(world / "corpus.jsonl"), "eval": str(world / "held_out.jsonl"),
            "text": {"fields": {"completion": "text"}}, "row_len": 64, "rows": 8,
            "micro_batches": 2,
        },
        "optimizer": {"learning_rate": 2e-2, "weight_decay": 0.1},
        **changes,
    }  # fmt: skip


def mesh_of(sizes):
    config = MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    return make_mesh(config, jax.devices()[: math.prod(sizes)])


def make_sft(world, sizes=(1, 1, 1), **changes):
    return Sft(SftConfig.model_validate(sft_values(world, **changes)), mesh_of(sizes))


def make_grpo(world, monkeypatch, sizes=(1, 1, 1), model=None, **algorithm):
    def sevens(samples):
        return [Score(s.completion.count("7") / max(1, s.num_tokens)) for s in samples]

    monkeypatch.setattr(scoring, "RewardPool", lambda config, **_: sevens)
    values = {
        "phase": "grpo", **common(world, **(model or {})),
        "data": {
            "train": str(world / "train.jsonl"),
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
        },
        "rollout": {"num_prompts": 8, "group_size": 4, "max_prompt_tokens": 32, "max_tokens": 8},
        "algorithm": {"preset": "grpo", "kl_coef": 0.05, **algorithm},
        "rewards": {"functions": {"sevens": {"function": "verify.exact"}}},
        "optimizer": {"learning_rate": 2e-2},
    }  # fmt: skip
    return Grpo(GrpoConfig.model_validate(values), mesh_of(sizes))


def run(phase, num_steps):
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seen = []
    for _ in range(num_steps):
        state, collected = phase.collect(state, records)
        for batch in collected.batches:
            state, metrics = phase.step(state, batch)
            seen.append(jax.device_get(metrics))
        state = state._replace(step=state.step + 1)
    return state, seen


def names(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


# A base that is donated would find no result to become.
@pytest.mark.filterwarnings("error:Some donated buffers")
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_sft_learns_and_leaves_the_base_as_it_was(world, quantize):
    phase = make_sft(world, model={"quantize": quantize})
    frozen = phase._policy.frozen
    arrays, before = jax.tree.leaves(frozen), jax.device_get(frozen)
    state = phase.init(jax.random.PRNGKey(0))
    first = phase.evaluate(state).metrics["eval/loss"]
    state, _ = run(phase, 30)
    assert phase.evaluate(state).metrics["eval/loss"] < first - 1.0
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert all(a is b for a, b in zip(jax.tree.leaves(phase._policy.frozen), arrays, strict=True))
    assert not any(array.is_deleted() for array in arrays)
    if quantize is None:
        _, loaded = load(world / "base")
        jax.tree.map(np.testing.assert_array_equal, frozen, loaded)
    else:
        kernel = frozen["layers"]["mlp"]["up"]["kernel"]
        assert (
            kernel["codes"].dtype == np.uint8
            and num_bytes(frozen) < num_bytes(load(world / "base")[1]) / 3
        )


def test_only_adapters_train(world):
    """7 projections with a and b: 14 arrays, and as many of each moment."""
    state = make_sft(world).init(jax.random.PRNGKey(0))
    assert len(names(state.params)) == 14
    assert all("'lora'" in name for name in names(state.params))
    moments = [name for name in names(state.opt_state) if "count" not in name]
    assert len(moments) == 28 and all("'lora'" in name for name in moments)
    assert state.reference is None
    rank, width, inner = 4, 32, 64
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 2 * rank * (
        4 * (width + width) + 3 * (width + inner)
    )


def live_bytes():
    gc.collect()  # What other tests have left in cycles must not go while we count.
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize("reference_every", [0, 2])
def test_grpo_with_a_reference_that_is_the_base(world, monkeypatch, reference_every):
    before = live_bytes()
    phase = make_grpo(world, monkeypatch, reference_every=reference_every)
    state = phase.init(jax.random.PRNGKey(0))
    base, adapters = num_bytes(phase._policy.frozen), num_bytes(state.params)
    copies = 4 if reference_every else 3  # with their two moments
    assert 0 <= live_bytes() - before - base - copies * adapters < 4096, "no second copy"
    ref = phase._ref(state)
    for a, b in zip(jax.tree.leaves(lora.split(ref)[1]), jax.tree.leaves(phase._policy.frozen),
                    strict=True):  # fmt: skip
        assert a is b
    state, seen = run(phase, 4)
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-8)
    assert seen[1]["kl"] > 1e-5
    assert all(x["sampling/sampling_logp_difference/max"] < 1e-4 for x in seen)
    _, loaded = load(world / "base")
    jax.tree.map(np.testing.assert_array_equal, phase._policy.frozen, loaded)
    if not reference_every:
        records = phase.records()
        _, collected = phase.collect(state, records)
        (batch,) = collected.batches
        mb = {k: v[0] for k, v in batch.items()}
        hidden, _ = Model(SHAPE).apply(
            loaded, mb["tokens"], mb["segment_ids"], mb["positions"],
            branches=mb.get("branches"),
        )  # fmt: skip
        logp = jax.nn.log_softmax(Model(SHAPE).logits(loaded, hidden))
        expected = jnp.take_along_axis(logp[:, :-1], mb["tokens"][:, 1:, None], -1)[..., 0]
        targets = np.asarray(mb["mask"][:, 1:])
        found = np.asarray(phase._ref_logps(ref, batch))[0][:, 1:]
        np.testing.assert_allclose(found[targets], np.asarray(expected)[targets], atol=1e-4)


@pytest.mark.parametrize("kl_coef, copies", [(0.0, 3), (0.05, 4)])
def test_all_weights_are_there_once_and_once_more_as_a_reference(
    world, monkeypatch, kl_coef, copies
):
    """And two moments; what was read is not kept beside what is trained."""
    before = live_bytes()
    phase = make_grpo(world, monkeypatch, model={"lora": None}, kl_coef=kl_coef)
    state = phase.init(jax.random.PRNGKey(0))
    assert 0 <= live_bytes() - before - copies * num_bytes(state.params) < 4096
    again = phase.init(jax.random.PRNGKey(1))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


def test_grpo_learns(world, monkeypatch):
    phase = make_grpo(world, monkeypatch, kl_coef=0.0)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    rewards = []
    for _ in range(15):
        state, collected = phase.collect(state, records)
        for batch in collected.batches:
            state, _ = phase.step(state, batch)
        rewards.append(collected.metrics["reward"])
        state = state._replace(step=state.step + 1)
    assert rewards[0] < 0.15 and rewards[-1] > 0.4


@pytest.fixture(scope="module")
def three_steps(world):
    """quantize and dropout -> on one device."""
    return {
        quantize: run(make_sft(world, model=variant(quantize)), 3) for quantize in (None, "int8")
    }


def variant(quantize):
    return {"quantize": quantize, "lora": {**LORA, "dropout": 0.25, "dora": quantize is None}}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_8_devices_change_nothing(world, three_steps, quantize):
    """Dropout included: what is left out depends on the step alone."""
    expected_state, expected = three_steps[quantize]
    phase = make_sft(world, (2, 2, 2), model=variant(quantize))
    codes = phase._policy.frozen["layers"]["mlp"]["up"]["kernel"]
    codes = codes if quantize is None else codes["codes"]
    assert tuple(codes.sharding.spec) == (None, "fsdp", "tensor")
    state, seen = run(phase, 3)
    for got, want in zip(seen, expected, strict=True):
        assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-4)
        assert float(got["grad_norm"]) == pytest.approx(float(want["grad_norm"]), rel=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
        jax.device_get(state.params), jax.device_get(expected_state.params),
    )  # fmt: skip


def test_dropout_is_for_training(world):
    """Another mask for each micro-batch and step; none where the loss is evaluated."""
    phase = make_sft(world, model={"lora": {**LORA, "dropout": 0.5}})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seeds = []
    for _ in range(2):
        _, collected = phase.collect(state, records)
        (batch,) = collected.batches
        seeds += np.asarray(batch["dropout_seed"]).tolist()
        state = state._replace(step=state.step + 1)
    assert len(set(seeds)) == 4
    assert "dropout_seed" not in make_sft(world).collect(state, phase.records())[1].batches[0]
    moved = jax.tree.map(lambda x: x + 0.1, state.params)
    plain = make_sft(world)
    assert (
        phase.evaluate(state._replace(params=moved)).metrics
        == plain.evaluate(state._replace(params=moved)).metrics
    )
    # In training, other masks give other losses of the same batch.
    other = {**batch, "dropout_seed": batch["dropout_seed"] + 1}
    losses = []
    for given in (batch, other, batch):
        copy = jax.tree.map(jnp.copy, state._replace(params=moved))
        losses.append(float(phase.step(copy, given)[1]["loss"]))
    assert losses[0] == losses[2] and abs(losses[0] - losses[1]) > 1e-4


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The directory of a run of 4 steps with dropout on a quantised base."""
    folder = tmp_path_factory.mktemp("runs")
    return run_to_the_end(world, folder), folder


def config_of(world, folder):
    return SftConfig.model_validate(
        sft_values(
            world,
            model={"quantize": "int8", "lora": {**LORA, "dropout": 0.25}},
            output_dir=str(folder),
            loop={"steps": 4, "checkpoint_every": 2, "tensorboard": False},
        )
    )


def run_to_the_end(world, folder):
    return run_phase(config_of(world, folder), command="again").parent


def adapters_of(run_dir, template, step=None):
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=2, read_only=True)
    with contextlib.closing(checkpoints):
        step, parts = checkpoints.restore_parts({"params": template}, step)
        return step, parts["params"]


def test_a_run_that_was_killed_goes_on_bit_for_bit(world, finished, tmp_path, monkeypatch):
    run_dir, _ = finished
    step = Sft.step

    def die(self, state, batch):
        if int(state.step) == 3:
            raise MemoryError
        return step(self, state, batch)

    monkeypatch.setattr(Sft, "step", die)
    with pytest.raises(MemoryError):
        run_to_the_end(world, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "run/model").exists()
    again = run_to_the_end(world, tmp_path)
    template = make_sft(world).init(jax.random.PRNGKey(0)).params
    found, expected = (adapters_of(folder, template) for folder in (again, run_dir))
    assert found[0] == expected[0] == 4
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    for name in ("model.safetensors", "config.json"):
        assert (again / "model" / name).read_bytes() == (run_dir / "model" / name).read_bytes()


def test_a_checkpoint_holds_no_base_and_the_run_says_which(world, finished):
    run_dir, _ = finished
    tree = ocp.PyTreeCheckpointHandler().metadata(run_dir / "checkpoints/4/state").tree
    there = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    state = make_sft(world).init(jax.random.PRNGKey(0))
    assert there == num_bytes(state) < num_bytes(load(world / "base")[1])
    inputs = json.loads((run_dir / "inputs.json").read_text())
    assert f"model.path {world / 'base'}" in inputs


def test_the_model_of_a_run_is_merged_from_what_the_codes_stand_for(world, finished):
    run_dir, folder = finished
    phase = Sft(config_of(world, folder), mesh_of((1, 1, 1)))
    state = phase.init(jax.random.PRNGKey(0))
    _, adapters = adapters_of(run_dir, state.params)
    model, merged = load(run_dir / "model")
    assert model == Model(SHAPE)
    w = phase._policy.frozen["layers"]["mlp"]["down"]["kernel"]
    ab = adapters["layers"]["mlp"]["down"]["lora"]
    f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    expected = f64(w["codes"]) * f64(w["scale"])[:, None] + 2 * f64(ab["a"]) @ f64(ab["b"])
    np.testing.assert_allclose(merged["layers"]["mlp"]["down"]["kernel"], expected, atol=1e-6)
    assert np.abs(f64(ab["a"]) @ f64(ab["b"])).max() > 1e-3
    np.testing.assert_array_equal(merged["embedding"], load(world / "base")[1]["embedding"])


def test_export_of_a_checkpoint(world, finished, tmp_path):
    run_dir, _ = finished
    assert export_checkpoint(run_dir, tmp_path / "merged") == 4
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        run_dir / "model/model.safetensors"
    ).read_bytes()
    assert export_checkpoint(run_dir, tmp_path / "adapter", step=2, adapter=True) == 2
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world / "base")


@pytest.mark.slow
def test_export_of_a_checkpoint_is_of_the_average_as_that_of_a_run_is(world, tmp_path):
    optimizer = OptimizerConfig(name="schedule_free", learning_rate=0.01)
    config = config_of(world, tmp_path).model_copy(update={"optimizer": optimizer})
    run_dir = run_phase(config, command="again").parent
    assert export_checkpoint(run_dir, tmp_path / "merged") == 4
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        run_dir / "model/model.safetensors"
    ).read_bytes()
    _, y = adapters_of(run_dir, make_sft(world).init(jax.random.PRNGKey(0)).params)
    _, merged = load(run_dir / "model")
    phase = make_sft(world, model={"quantize": "int8"})
    of_y = phase._policy.merged(y)["layers"]["mlp"]["up"]["kernel"]
    assert np.abs(np.asarray(of_y - merged["layers"]["mlp"]["up"]["kernel"])).max() > 1e-5


def test_a_run_begins_with_the_adapters_of_a_directory(world, finished, tmp_path):
    run_dir, _ = finished
    export_checkpoint(run_dir, tmp_path / "adapter", adapter=True)
    again = make_sft(world, (2, 2, 2), model={"adapter": str(tmp_path / "adapter")})
    state = again.init(jax.random.PRNGKey(0))
    _, adapters = adapters_of(run_dir, make_sft(world).init(jax.random.PRNGKey(0)).params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), adapters)


def test_export_on_another_base_is_refused(world, finished, tmp_path):
    run_dir, _ = finished
    file = Path(world / "base/generation_config.json")
    before = file.read_bytes()
    file.write_bytes(before + b"\n")
    try:
        with pytest.raises(UserError, match=r"was made from another model.path .*base"):
            export_checkpoint(run_dir, tmp_path / "out")
        with pytest.raises(UserError, match=r"was made from another model.path .*base"):
            run_to_the_end(world, run_dir.parent)
    finally:
        file.write_bytes(before)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": {"hidden_size": 8}, "lora": LORA}, "lora adapts a model that is there: give pa"),
        ({"path": "x", "quantize": "nf4"}, "quantize='nf4' is for weights that do not train: giv"),
        ({"path": "x", "adapter": "y"}, "adapter='y' is read with lora, which says its rank"),
        ({"path": "x", "lora": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_configs_that_make_no_sense(values, message):
    with pytest.raises(ValidationError, match=message):
        ModelSource.model_validate(values)


def test_dropout_is_refused_where_the_policy_samples(world, monkeypatch):
    with pytest.raises(ValidationError, match=r"model.lora.dropout=0.1 would train another policy"):
        make_grpo(world, monkeypatch, model={"lora": {**LORA, "dropout": 0.1}})


def test_a_pattern_that_names_nothing(world):
    with pytest.raises(UserError, match=r"lora.targets: 'q_proj' names no projection; there are"):
        make_sft(world, model={"lora": {"targets": ("q_proj",)}}).init(jax.random.PRNGKey(0))


def test_a_run_without_adapters_has_none_to_export(world, tmp_path):
    phase = make_sft(world, model={"lora": None})
    state = phase.init(jax.random.PRNGKey(0))
    with pytest.raises(UserError, match=r"no model.lora\), so there is no adapter"):
        phase._policy.export_adapter(state.params, tmp_path / "out")
    assert not (tmp_path / "out").exists()
