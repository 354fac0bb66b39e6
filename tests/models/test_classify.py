"""Reward models and value heads as files, against the classifiers of `transformers`."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.core.errors import UserError
from alignjax.models import (
    Model,
    ModelConfig,
    ScalarModel,
    load,
    load_reward,
    load_value_head,
    save,
    save_reward,
    save_value_head,
)
from alignjax.models.config import FAMILIES
from alignjax.models.heads import last_values
from alignjax.sharding import MeshConfig, make_mesh

torch = pytest.importorskip("torch", reason="needs the dev extra")
transformers = pytest.importorskip("transformers", reason="needs the dev extra")

VOCAB = 37
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QWEN = ModelConfig(family="qwen3", vocab_size=VOCAB, hidden_size=24, head_dim=8, num_kv_heads=2)


def make(config):
    """A reward model in which every parameter is random."""
    model = ScalarModel(Model(config))
    rng = np.random.default_rng(0)
    noisy = lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    return model, jax.tree.map(noisy, jax.jit(model.init)(jax.random.key(0)))


def make_batch():
    """Three texts, padded on the right with id 0, which no text holds."""
    lengths = np.array([9, 4, 1])
    is_real = np.arange(9)[None] < lengths[:, None]
    tokens = np.random.default_rng(1).integers(1, VOCAB, (3, 9))
    positions = np.where(is_real, np.arange(9)[None], 0)
    return tuple(x.astype(np.int32) for x in (np.where(is_real, tokens, 0), is_real, positions))


def scores(model, params):
    tokens, segment_ids, positions = make_batch()
    values = jax.jit(model.apply)(params, tokens, segment_ids, positions)
    return np.asarray(last_values(values, segment_ids, 1)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_scores(tmp_path, family, caplog, recwarn):
    config = ModelConfig(family=family, vocab_size=VOCAB, hidden_size=24, num_layers=2)
    model, params = make(config)
    save_reward(tmp_path, model, params, extra_config=IDS)
    transformers.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        reference, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, output_loading_info=True
        )
    assert not any(report.values()), report
    assert not caplog.records and not recwarn.list
    assert type(reference).__name__.endswith("ForSequenceClassification")
    assert reference.config.num_labels == 1 and reference.config.pad_token_id == 0
    tokens, is_real, _ = make_batch()
    with torch.no_grad():
        expected = reference.eval()(
            input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(is_real).long()
        ).logits.numpy()
    assert expected.shape == (3, 1) and expected.std() > 0.1
    np.testing.assert_allclose(scores(model, params), expected, atol=1e-4)
    again, read = load_reward(tmp_path)
    np.testing.assert_array_equal(scores(again, read), scores(model, params))
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_classifier_of_transformers_is_read(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForSequenceClassification(config).eval()
    reference.save_pretrained(tmp_path)
    model, params = load_reward(tmp_path)
    tokens, is_real, _ = make_batch()
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(is_real).long()
        ).logits.numpy()
    np.testing.assert_allclose(scores(model, params), expected, atol=1e-4)


def test_a_policy_with_an_unembedding_becomes_a_reward_model(tmp_path):
    """The unembedding has nothing to say in it, and is left out."""
    config = QWEN.model_copy(update={"tie_embeddings": False})
    model, params = make(config)
    assert "unembedding" in params["decoder"]
    save_reward(tmp_path, model, params, extra_config=IDS)
    again, read = load_reward(tmp_path)
    assert again.decoder.config.tie_embeddings and "unembedding" not in read["decoder"]
    np.testing.assert_array_equal(scores(again, read), scores(model, params))


def test_eight_devices_and_bfloat16(tmp_path):
    model, params = make(QWEN)
    save_reward(tmp_path, model, params, extra_config=IDS, dtype="bfloat16", max_shard_bytes=9000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, read = load_reward(tmp_path, mesh=mesh)
    assert read["head"]["kernel"].addressable_shards[0].data.shape == (12,)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, read, half)


def test_a_reward_model_needs_padding(tmp_path):
    model, params = make(QWEN)
    with pytest.raises(ValueError, match="needs a pad_token_id"):
        save_reward(tmp_path, model, params, extra_config={"eos_token_id": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, r"\['Qwen3ForCausalLM'\] is no reward model"),
        ({"architectures": None}, "is no reward model; expected one of LlamaForSequence"),
        ({"id2label": {"0": "a", "1": "b"}}, "a classifier with 2 labels"),
        ({"id2label": None}, "a classifier with 2 labels"),
        ({"hidden_act": "what"}, "hidden_act='what' is not supported"),
    ],
)
def test_wrong_configs(tmp_path, change, message):
    save_reward(tmp_path, *make(QWEN), extra_config=IDS)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        load_reward(tmp_path)


def test_one_is_not_taken_for_the_other(tmp_path):
    model, params = make(QWEN)
    save_reward(tmp_path / "reward", model, params, extra_config=IDS)
    with pytest.raises(UserError, match=r"Qwen3ForSequenceClassification.* is not supported"):
        load(tmp_path / "reward")
    save(tmp_path / "policy", model.decoder, params["decoder"])
    with pytest.raises(UserError, match="is no reward model"):
        load_reward(tmp_path / "policy")


def test_value_heads(tmp_path):
    kernel = np.arange(5, dtype=np.float32)
    save_value_head(tmp_path, {"kernel": jnp.asarray(kernel)})
    file = tmp_path / "value_head.safetensors"
    stored = load_file(file)
    assert stored.keys() == {"value_head.weight"}
    np.testing.assert_array_equal(stored["value_head.weight"], kernel[None])
    read = load_value_head(tmp_path)["kernel"]
    assert read.dtype == jnp.float32
    np.testing.assert_array_equal(read, kernel)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / 'x'))}.*no value head"):
        load_value_head(tmp_path / "x")
    save_file({"value_head.weight": kernel}, file)
    with pytest.raises(UserError, match=r"expected 'value_head.weight' of shape \(1, D\) alone"):
        load_value_head(tmp_path)
