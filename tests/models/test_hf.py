"""Logits, padding, caching and files, against the models of `transformers` (a published source)."""

import copy
import functools
import json
import shutil
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.core.errors import UserError
from alignjax.models import Model, ModelConfig, load, load_eos_ids, save
from alignjax.sharding import MeshConfig, make_mesh
from tests.models.references import (
    CASES,
    FAMILIES,
    LENGTH_DEPENDENT,
    VOCAB,
    T,
    make_reference,
    random_tokens,
    reference_logits,
    torch,
    transformers,
)

# Compiled once for each model, in whatever test.
LOGITS = jax.jit(
    lambda model, params, *batch: model.logits(params, model.apply(params, *batch)[0]),
    static_argnums=0,
)
APPLY = jax.jit(Model.apply, static_argnums=0, donate_argnums=5)


def ours(model, params, tokens, segment_ids=None, positions=None):
    tokens = jnp.asarray(tokens)
    if segment_ids is None:
        segment_ids = np.ones(tokens.shape, np.int32)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    return np.asarray(LOGITS(model, params, tokens, segment_ids, positions))


@pytest.mark.parametrize("case", CASES)
def test_logits_unpadded(saved, case):
    reference, directory = saved(case)
    model, params = load(directory)
    tokens = random_tokens()
    expected = reference_logits(reference, tokens)
    assert 1 < np.abs(expected).max() < 100  # an output worth comparing
    np.testing.assert_allclose(ours(model, params, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_padded(saved, case, side):
    reference, directory = saved(case)
    model, params = load(directory)
    tokens, lengths = random_tokens(), np.array([T, 11, 1])
    slots = np.arange(T)[None]
    first = (T - lengths)[:, None] if side == "left" else np.zeros((3, 1), int)
    is_real = (slots >= first) & (slots < first + lengths[:, None])
    positions = np.where(is_real, slots - first, 0).astype(np.int32)
    result = ours(model, params, tokens, is_real.astype(np.int32), positions)
    assert np.isfinite(result).all()
    expected = reference_logits(reference, tokens, is_real.astype(int), positions.astype(int))
    np.testing.assert_allclose(result[is_real], expected[is_real], atol=1e-4, rtol=0)
    if case in LENGTH_DEPENDENT:
        return
    for row, length in enumerate(lengths):  # and what the padding holds is of no influence
        alone = reference_logits(reference, tokens[row : row + 1][:, is_real[row]])
        np.testing.assert_allclose(result[row, is_real[row]], alone[0, :length], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case not in LENGTH_DEPENDENT])
def test_logits_cached(saved, case):
    """Left-padded prefill into a longer cache, then token by token."""
    reference, directory = saved(case)
    model, params = load(directory)
    tokens, prompt = random_tokens(), T - 5
    padding = np.array([0, 2, 5])
    is_real = np.arange(T)[None] >= padding[:, None]
    positions = np.maximum(np.arange(T)[None] - padding[:, None], 0).astype(np.int32)
    cache, hidden = model.init_cache(3, T + 3), []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, T))]:
        part = np.s_[:, start:stop]
        batch = tokens[part], is_real[part].astype(np.int32), positions[part]
        step, cache = APPLY(model, params, *map(jnp.asarray, batch), cache)
        hidden.append(step)
    assert int(cache.index) == T
    result = np.asarray(model.logits(params, jnp.concatenate(hidden, 1)))
    assert np.isfinite(result).all()
    expected = reference_logits(reference, tokens, is_real.astype(int), positions.astype(int))
    np.testing.assert_allclose(result[is_real], expected[is_real], atol=1e-4, rtol=0)


def greedy(model, params, prompt, num_tokens):
    """[P] -> [num_tokens], through prefill and a cache."""
    cache, tokens, position, out = model.init_cache(1, len(prompt) + num_tokens), prompt, 0, []
    for _ in range(num_tokens):
        n = len(tokens)
        positions = jnp.arange(position, position + n, dtype=jnp.int32)[None]
        batch = jnp.asarray(tokens, jnp.int32)[None], jnp.ones((1, n), jnp.int32), positions
        hidden, cache = APPLY(model, params, *batch, cache)
        tokens, position = [int(model.logits(params, hidden[:, -1]).argmax())], position + n
        out += tokens
    return out


@pytest.mark.parametrize("case", CASES)
def test_save_then_transformers(saved, tmp_path, case):
    """Import, export, import: the same bits, and transformers agrees with what was exported."""
    reference, directory = saved(case)
    model, params = load(directory)
    ids = {"bos_token_id": 1, "eos_token_id": VOCAB - 1, "pad_token_id": 0}
    save(tmp_path, model, params, extra_config=ids)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == ids
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    again, read = load(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    exported, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(exported) is type(reference)
    assert exported.config.eos_token_id == VOCAB - 1
    tokens = random_tokens()
    expected = reference_logits(reference, tokens)
    np.testing.assert_array_equal(reference_logits(exported.eval(), tokens), expected)
    before, after = load_file(directory / "model.safetensors"), load_file(
        tmp_path / "model.safetensors"
    )  # fmt: skip
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("case", ["llama-gqa-tied", "qwen3-gqa-tied", "gemma2-caps"])
def test_greedy_text_is_that_of_transformers(saved, case):
    reference, directory = saved(case)
    model, params = load(directory)
    tokens = random_tokens()
    prompt = torch.tensor(tokens[:1]).long()
    text = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8,
        eos_token_id=None,
    )  # fmt: skip
    assert greedy(model, params, list(tokens[0]), 8) == text[0, T:].tolist()


ONE_OF_EACH = {family: case for case, (family, _) in reversed(CASES.items())}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(saved, family):
    """Of the summed log-prob of the next tokens, for every parameter."""
    reference, directory = saved(ONE_OF_EACH[family])
    model, params = load(directory)
    tokens = np.maximum(random_tokens(2), 1)  # torch gives the padding's embedding no gradient
    segments = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)

    @jax.jit
    def gradient(params):
        def total(params):
            hidden, _ = model.apply(params, tokens, segments, positions)
            logps = jax.nn.log_softmax(model.logits(params, hidden)[:, :-1])
            return jnp.sum(jnp.take_along_axis(logps, tokens[:, 1:, None], 2))

        return jax.grad(total)(params)

    reference.zero_grad()
    ids = torch.tensor(tokens).long()
    logps = torch.log_softmax(reference(input_ids=ids, use_cache=False).logits[:, :-1], -1)
    logps.gather(2, ids[:, 1:, None]).sum().backward()
    theirs = copy.deepcopy(reference)
    with torch.no_grad():  # The gradient takes the place of the weights, and is saved like them.
        for parameter, source in zip(theirs.parameters(), reference.parameters(), strict=True):
            parameter.copy_(source.grad)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        _, expected = load(folder)

    found = gradient(params)
    whole = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    for path, theirs in jax.tree.leaves_with_path(expected):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, found)
        # Some are 0 but for rounding: a bias on all keys alike moves no softmax.
        error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-4 * whole)
        assert error < 1e-3, (jax.tree_util.keystr(path), error)


def test_gpt2_as_it_is_published(saved, tmp_path):
    """Without the prefix of the trunk, and with the causal masks that old files hold."""
    _, directory = saved("gpt2")
    shutil.copy(directory / "config.json", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], load(directory)[1])


def test_sharded_checkpoint(saved, tmp_path):
    reference, directory = saved("qwen3-gqa-tied")
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], load(directory)[1])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = sorted(index["weight_map"])[0]
    file = tmp_path / index["weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{file.name}.*{name}.*missing"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: no such file"):
        load(tmp_path)
    for wrong in ("../elsewhere.safetensors", "..", "", "model.bin"):
        index["weight_map"][name] = wrong
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"index\.json: .* \.safetensors files beside it"):
            load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32(saved, tmp_path, dtype):
    reference, _ = saved("llama-gqa-tied")
    half = make_reference(*CASES["llama-gqa-tied"][:1], **CASES["llama-gqa-tied"][1]).to(dtype)
    half.save_pretrained(tmp_path)
    _, params = load(tmp_path)
    expected = reference.model.embed_tokens.weight.detach().to(dtype).float().numpy()
    assert params["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(params["embedding"], expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_load_on_eight_devices(saved, sizes):
    reference, directory = saved("qwen3-gqa-tied")
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    model, params = load(directory, mesh=mesh)
    kernel = params["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.shape == (3, 24, 40)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {
        (3, 24 // sizes[1], 40 // sizes[2])
    }
    key = params["layers"]["attention"]["key"]["kernel"]  # [3, 24, 2, 16]
    assert key.addressable_shards[0].data.shape == (3, 24 // sizes[1], 2 // sizes[2], 16)
    embedding = params["embedding"]  # 37 words do not divide by 2: replicated over tensor
    assert embedding.addressable_shards[0].data.shape == (37, 24 // sizes[1])
    jax.tree.map(np.testing.assert_array_equal, params, load(directory)[1])
    expected = reference_logits(reference, random_tokens(8))
    np.testing.assert_allclose(ours(model, params, random_tokens(8)), expected, atol=1e-4, rtol=0)


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()},
              directory / "model.safetensors")  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """A directory of our own, to be damaged."""
    model = Model(ModelConfig(vocab_size=VOCAB, hidden_size=8, num_heads=2, num_layers=2))
    save(tmp_path, model, model.init(jax.random.key(0)))
    return tmp_path


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(O_PROJ), rf"tensor '{O_PROJ}' is missing"),
        (
            lambda t: t.update({O_PROJ: t[O_PROJ][:, :4]}),
            r"o_proj.weight' has shape \(8, 4\).*8, 8",
        ),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), r"safetensors: tensor 'extra' is not"),
        (lambda t: t.update({O_PROJ: t[O_PROJ].astype(np.int32)}), r"o_proj.weight' is I32"),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            r"'lm_head.weight' differs from the embedding",
        ),
        (
            lambda t: t.update(
                {"lm_head.weight": t["model.embed_tokens.weight"].astype(ml_dtypes.float8_e4m3fn)}
            ),
            r"'lm_head.weight' is F8_E4M3; expected one of",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][:3]}),
            r"'lm_head.weight' has shape \(3, 8\)",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(8, np.float32)}),
            r"'model.layers.2.input_layernorm.weight' is not part",
        ),
    ],
)
def test_wrong_tensors(directory, change, message):
    edit_tensors(directory, change)
    with pytest.raises(UserError, match=message):
        load(directory)


def test_harmless_extra_tensors(directory):
    """A copy of the tied embedding, as published Qwen3 files hold, and old rotary buffers."""

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    edit_tensors(directory, add)
    load(directory)


def test_broken_files(directory):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load(directory / "nowhere")
    (directory / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load(directory)
    (directory / "config.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(UserError, match=r"config\.json:2: not JSON"):
        load(directory)
    (directory / "config.json").write_bytes(b'{"prefix": "\xff"}')
    with pytest.raises(UserError, match=r"config\.json: not UTF-8 text \(byte 12\)"):
        load(directory)
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: cannot be read: Is a directory"):
        load(directory)


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ([3, 4], 2, (3, 4)),
        (3, [2, 4], (3,)),
        (None, [2, 4], (2, 4)),
        ("no file", 2, (2,)),
        (None, None, ()),
    ],
)
def test_the_ids_that_end_a_text(tmp_path, generation, config, ids):
    """As transformers does it, generation_config.json goes before config.json."""
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation != "no file":
        data = {"eos_token_id": generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert load_eos_ids(tmp_path) == ids


@pytest.mark.parametrize("wrong", ["2", [2, "3"], True, [-1], {"a": 1}, 2.0])
def test_what_is_no_id_is_refused(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.*: expected"):
        load_eos_ids(tmp_path)


def test_failed_save_leaves_the_old_files(directory, monkeypatch):
    model, params = load(directory)
    before = {file.name: file.read_bytes() for file in directory.iterdir()}

    def fail(file, plan, dtype):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("alignjax.models.stored._write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(directory, model, jax.tree.map(lambda x: x + 1, params))
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before
