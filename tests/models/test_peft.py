"""Adapters as PEFT has them: `peft` itself reads them, and computes what we do."""

import json

import jax
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.models import Model, ModelConfig, lora, peft, save
from alignjax.models.lora import LoraConfig

CONFIG = ModelConfig(
    family="qwen3", vocab_size=19, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=48, initializer_range=0.3,
)  # fmt: skip
KINDS = {
    "lora": LoraConfig(rank=3, alpha=6),
    "rslora": LoraConfig(rank=3, alpha=6.5, rslora=True, dropout=0.25),
    "dora": LoraConfig(rank=3, alpha=6, dora=True),
    "some": LoraConfig(rank=2, alpha=8, targets=("attention.out", "mlp.down")),
}


def write(folder, kind):
    """A base in folder/base and its adapters in folder/adapter; the model and its parameters."""
    model = Model(CONFIG, lora=KINDS[kind])
    base = Model(CONFIG).init(jax.random.key(0))
    adapters = jax.jit(lora.init, static_argnums=0)(model, base, jax.random.key(1))
    leaves, structure = jax.tree.flatten(adapters)
    rng = np.random.default_rng(0)
    leaves = [x + rng.normal(size=x.shape, scale=0.2).astype(np.float32) for x in leaves]
    adapters = jax.tree.unflatten(structure, leaves)
    save(folder / "base", Model(CONFIG), base)
    (folder / "adapter").mkdir()
    peft.save(folder / "adapter", model, adapters, base=str(folder / "base"))
    return model, base, adapters


@pytest.mark.parametrize("kind", KINDS)
def test_read_as_written(tmp_path, kind):
    model, _, adapters = write(tmp_path, kind)
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path / "adapter", model), adapters)


def test_an_adapter_that_peft_made(tmp_path):
    """Its own defaults in its own files, on two projections."""
    library = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = Model(CONFIG).init(jax.random.key(0))
    save(tmp_path / "base", Model(CONFIG), base)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = library.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    adapted = library.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    kind = LoraConfig(rank=3, alpha=5, targets=("attention.query", "mlp.down"))
    model = Model(CONFIG, lora=kind)
    params = lora.combine(base, peft.load(tmp_path / "adapter", model))
    tokens = np.random.default_rng(1).integers(0, 19, (2, 9)).astype(np.int32)
    batch = tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1))
    found = jax.jit(lambda p: model.logits(p, model.apply(p, *batch)[0]))(params)
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"adapter_config.json: r=2, but lora.rank=4: make them one"),
        ({"rslora": True}, r"use_rslora=False, but lora.rslora=True"),
        ({"targets": ("mlp.*",)}, r"'base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight' "
         "is missing"),
        ({"targets": ("mlp.down",)}, r"self_attn.o_proj.lora_A.weight' belongs to no projection"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(tmp_path, changes, message):
    write(tmp_path, "some")
    model = Model(CONFIG, lora=KINDS["some"].model_copy(update=changes))
    with pytest.raises(UserError, match=message):
        peft.load(tmp_path / "adapter", model)
    with pytest.raises(UserError, match=r"base: not an adapter of PEFT: .*adapter_config.json"):
        peft.load(tmp_path / "base", model)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_same(tmp_path, kind):
    library = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, base, adapters = write(tmp_path, kind)
    tokens = np.random.default_rng(1).integers(0, 19, (2, 9)).astype(np.int32)
    batch = tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        before = theirs(torch.tensor(tokens).long()).logits.numpy()
        adapted = library.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        expected = adapted.eval()(torch.tensor(tokens).long()).logits.numpy()
    params = lora.combine(base, adapters)
    found = jax.jit(lambda p: model.logits(p, model.apply(p, *batch)[0]))(params)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert np.abs(expected - before).max() > 0.5, "the adapter does something"
    config = adapted.peft_config["default"]
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert (config.r, config.lora_dropout) == (KINDS[kind].rank, KINDS[kind].dropout)


FUSED = {
    "phi3": ModelConfig(family="phi3", vocab_size=19, hidden_size=32, num_heads=4, num_kv_heads=2,
                        intermediate_size=48, initializer_range=0.3),
    "gpt2": ModelConfig(family="gpt2", vocab_size=19, hidden_size=32, num_heads=4,
                        initializer_range=0.3, activation="gelu_tanh"),
}  # fmt: skip
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FUSED_KINDS = {
    "all": LoraConfig(rank=3, alpha=6),
    "rslora": LoraConfig(rank=3, alpha=6.5, rslora=True),
    "dora": LoraConfig(rank=2, alpha=6, dora=True),
    "some": LoraConfig(rank=2, alpha=8, targets=("attention.query", "attention.value", "mlp.up")),
}


@pytest.mark.parametrize("kind", FUSED_KINDS)
@pytest.mark.parametrize("family", FUSED)
def test_projections_that_are_parts_of_one_tensor(tmp_path, family, kind):
    """For PEFT their adapters are one: the same function, and they come back bit for bit."""
    library = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    plain, model = Model(FUSED[family]), Model(FUSED[family], lora=FUSED_KINDS[kind])
    base = plain.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: x + rng.normal(size=x.shape, scale=0.2).astype(np.float32),
        lora.init(model, base, jax.random.key(1)),
    )
    save(tmp_path / "base", plain, base, extra_config=IDS)
    (tmp_path / "adapter").mkdir()
    peft.save(tmp_path / "adapter", model, adapters, base=str(tmp_path / "base"))
    back = peft.load(tmp_path / "adapter", model)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = np.random.default_rng(1).integers(0, 19, (2, 9)).astype(np.int32)
    batch = tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1))
    with torch.no_grad():
        before = theirs(torch.tensor(tokens).long()).logits.numpy()
        adapted = library.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        expected = adapted(torch.tensor(tokens).long()).logits.numpy()
    params = lora.combine(base, adapters)
    found = jax.jit(lambda p: model.logits(p, model.apply(p, *batch)[0]))(params)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    assert np.abs(expected - before).max() > 0.3, "the adapter does something"


def test_an_adapter_that_peft_made_of_a_tensor_with_three_projections(tmp_path):
    library = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = Model(FUSED["phi3"]).init(jax.random.key(0))
    save(tmp_path / "base", Model(FUSED["phi3"]), base, extra_config=IDS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = library.LoraConfig(
        r=3, lora_alpha=5, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False
    )
    adapted = library.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    targets = ("attention.query", "attention.key", "attention.value", "mlp.down")
    model = Model(FUSED["phi3"], lora=LoraConfig(rank=3, alpha=5, targets=targets))
    params = lora.combine(base, peft.load(tmp_path / "adapter", model))
    tokens = np.random.default_rng(1).integers(0, 19, (2, 9)).astype(np.int32)
    batch = tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1))
    found = jax.jit(lambda p: model.logits(p, model.apply(p, *batch)[0]))(params)
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)
    fewer = Model(FUSED["phi3"], lora=LoraConfig(rank=3, alpha=5, targets=targets[1:]))
    with pytest.raises(UserError, match=r"self_attn.qkv_proj is not one of .*key, .*value alone"):
        peft.load(tmp_path / "adapter", fewer)


def test_doras_magnitudes_are_of_the_whole_tensor(tmp_path):
    kind = LoraConfig(rank=2, dora=True, targets=("attention.query",))
    model = Model(FUSED["phi3"], lora=kind)
    adapters, _ = lora.split(model.init(jax.random.key(0)))
    with pytest.raises(UserError, match=r"qkv_proj of transformers holds more .* without --adapt"):
        peft.save(tmp_path, model, adapters, base="base")


def test_gpt2s_kernels_lie_the_other_way(tmp_path):
    """transformers keeps them [in, out], which PEFT must be told."""
    library = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(family="gpt2", vocab_size=19, hidden_size=32, num_heads=4)
    model = Model(config, lora=LoraConfig(rank=2, targets=("mlp.*", "attention.out")))
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda x: x + draw(size=x.shape, scale=0.2).astype(np.float32),
        model.init(jax.random.key(0)),
    )
    adapters, base = lora.split(params)
    save(tmp_path / "base", Model(config), base)
    (tmp_path / "adapter").mkdir()
    peft.save(tmp_path / "adapter", model, adapters, base=str(tmp_path / "base"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = library.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = np.random.default_rng(1).integers(0, 19, (2, 9)).astype(np.int32)
    batch = tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    found = model.logits(params, model.apply(params, *batch)[0])
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_config_is_json(tmp_path):
    write(tmp_path, "some")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["mlp.down_proj", "self_attn.o_proj"]
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (2, 8.0, False)
