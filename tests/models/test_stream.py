"""Checkpoints in and out a tensor at a time: what the host holds, what each device gets."""

import json
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.core.errors import UserError
from alignjax.models import Model, ModelConfig, load, save
from alignjax.models.config import FAMILIES
from alignjax.models.stored import Stored
from alignjax.sharding import MeshConfig, make_mesh

WIDE = ModelConfig(
    vocab_size=3000, hidden_size=256, intermediate_size=700, num_layers=12, num_heads=4,
    num_kv_heads=2, tie_embeddings=False,
)  # fmt: skip
NARROW = ModelConfig(
    family="qwen3", vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16, attention_bias=True,
)  # fmt: skip
FUSED = ModelConfig(
    family="phi3", vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=4,
    num_kv_heads=2,
)  # fmt: skip
GPT2 = ModelConfig(family="gpt2", vocab_size=37, hidden_size=24, num_layers=3, num_heads=4)
MIXED = ModelConfig(
    family="mixtral", vocab_size=37, hidden_size=24, intermediate_size=40, num_layers=3,
    num_heads=4, num_kv_heads=2, num_experts=4,
)  # fmt: skip


def random_params(model):
    """Random everywhere, biases and norms too."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def peak_of(function):
    """Bytes of memory of Python and NumPy at the worst moment; arrays of JAX are not in it."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_one_tensor(tmp_path, dtype):
    """Of 12 layers, each of half the size of the embedding; without what compiling takes."""
    model = Model(WIDE)
    params = random_params(model)
    save(tmp_path, model, params, dtype=dtype)
    load(tmp_path, param_dtype=dtype)
    largest = 3000 * 256 * jnp.dtype(dtype).itemsize
    total = sum(x.size for x in jax.tree.leaves(params)) * jnp.dtype(dtype).itemsize
    assert total > 10 * largest
    reading = peak_of(lambda: load(tmp_path, param_dtype=dtype))
    assert 0.9 * largest < reading < 1.2 * largest, "one tensor, seen by the measure"
    # On a CPU an array of JAX is not copied to be written: only a page of headers is on the host.
    assert peak_of(lambda: save(tmp_path / "again", model, params, dtype=dtype)) < 1.2 * largest


def test_each_process_reads_only_what_its_devices_keep(tmp_path, monkeypatch):
    """Shards over fsdp and tensor: no tensor is read whole, and each part once."""
    model = Model(NARROW)
    save(tmp_path, model, random_params(model))
    sizes = []
    read = Stored.read

    def counted(self, window):
        array = read(self, window)
        sizes.append((self.name, array.shape))
        return array

    monkeypatch.setattr(Stored, "read", counted)
    load(tmp_path, mesh=make_mesh(MeshConfig(fsdp=4, tensor=2)))
    of = [shape for name, shape in sizes if name == "model.layers.1.self_attn.q_proj.weight"]
    assert of == [(2 * 16, 24 // 4)] * 8  # 4 heads of 16 over tensor, a width of 24 over fsdp
    of = [shape for name, shape in sizes if name == "model.layers.1.self_attn.k_proj.bias"]
    assert of == [(16,)] * 2  # once for all four along fsdp


@pytest.mark.parametrize("config", [NARROW, FUSED, GPT2, MIXED], ids=lambda c: c.family)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_any_mesh_reads_and_writes_the_same(tmp_path, config, sizes):
    model = Model(config)
    params = random_params(model)
    save(tmp_path / "one", model, params)
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    again, read = load(tmp_path / "one", mesh=mesh)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    kernel = read["layers"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1:3] == (24 // sizes[1], 4 // sizes[2])
    save(tmp_path / "eight", model, read)
    one, eight = (tmp_path / name / "model.safetensors" for name in ("one", "eight"))
    assert one.read_bytes() == eight.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_in_files_and_of_parameters(tmp_path, dtype):
    """Rounded once, to the nearest; written as the parameters are unless told otherwise."""
    model = Model(NARROW)
    params = random_params(model)
    save(tmp_path, model, params, dtype=dtype)
    name = "model.layers.2.mlp.up_proj.weight"
    stored = load_file(tmp_path / "model.safetensors")[name]
    up = np.asarray(params["layers"]["mlp"]["up"]["kernel"][2]).T
    assert stored.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(stored, up.astype(jnp.dtype(dtype)))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == dtype
    for param_dtype in ("float32", "bfloat16"):
        _, read = load(tmp_path, param_dtype=param_dtype)
        kernel = read["layers"]["mlp"]["up"]["kernel"]
        assert kernel.dtype == param_dtype
        np.testing.assert_array_equal(kernel[2].T, stored.astype(jnp.dtype(param_dtype)))
        save(tmp_path / "again", model, read)
        assert load_file(tmp_path / "again/model.safetensors")[name].dtype == param_dtype


def test_shards(tmp_path):
    """As many as it takes; what an earlier save left behind goes, other files stay."""
    model = Model(NARROW)
    params = random_params(model)
    save(tmp_path, model, params)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    limit = 20_000
    save(tmp_path, model, params, max_shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in whole.values())}
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(x.nbytes for x in tensors.values()) <= limit
        assert {name for name, f in index["weight_map"].items() if f == file.name} == set(tensors)
        found |= tensors
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(found[name], tensor)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)
    save(tmp_path, model, params, max_shard_bytes=1)  # a file for each, however small
    assert len(list(tmp_path.glob("*.safetensors"))) == len(whole)
    save(tmp_path, model, params)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_a_tied_copy_is_compared_in_pieces(tmp_path):
    """A difference in the last of 3000 rows is seen, and neither tensor is held whole."""
    model = Model(WIDE.model_copy(update={"tie_embeddings": True, "num_layers": 1}))
    save(tmp_path, model, random_params(model))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, file)
    load(tmp_path)
    assert peak_of(lambda: load(tmp_path)) < 1.2 * 3000 * 256 * 4
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lm_head\.weight' differs from the embedding"):
        load(tmp_path)


def test_half_precision_is_read_as_it_is(tmp_path):
    """float16 has more digits than bfloat16 and a smaller range: neither is the other."""
    model = Model(NARROW)
    save(tmp_path, model, random_params(model))
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        save_file({name: x.astype(dtype) for name, x in whole.items()}, file)
        expected = whole["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(load(tmp_path)[1]["embedding"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_a_new_model_of_each_family_without_a_word(tmp_path, family, caplog):
    """Of defaults: those of a family that a user need not give must be written all the same."""
    torch = pytest.importorskip("torch", reason="needs the dev extra")
    transformers = pytest.importorskip("transformers", reason="needs the dev extra")
    model = Model(ModelConfig(family=family, vocab_size=37, hidden_size=24, num_layers=2))
    params = jax.tree.map(lambda x: x * 5, jax.jit(model.init)(jax.random.key(0)))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save(tmp_path, model, params, extra_config=ids, max_shard_bytes=20_000)
    transformers.logging.enable_propagation()
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert not any(report.values()), report
    assert not caplog.records
    assert {name: getattr(theirs.generation_config, name) for name in ids} == ids
    tokens = np.random.default_rng(0).integers(0, 37, (2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    hidden, _ = jax.jit(model.apply)(params, tokens, np.ones_like(tokens), positions)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(model.logits(params, hidden), expected, atol=1e-4)
