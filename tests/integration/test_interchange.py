"""Models trained here are models of transformers, and the other way round: logits, text, ids."""

import contextlib
import json
import logging
import os
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from alignjax.cli.main import main
from alignjax.recipes import chains
from alignjax.text import load_tokenizer, train_sentencepiece
from tests import alone

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A world, a sentencepiece vocabulary of it with a `<think>` of its own, and a directory."""
    folder = tmp_path_factory.mktemp("home")
    chains.write(folder / "world", seed=0, num_questions=60, num_drills=20, num_train=8, num_test=4)
    texts = [
        json.loads(x)["text"] for x in (folder / "world/corpus.jsonl").read_text().splitlines()
    ]
    texts += [f"How many apples are {i} apples and {i % 7} more?" for i in range(60)]
    train_sentencepiece(texts, folder / "vocabulary", 306, special_tokens=["<think>", "</think>"])
    return folder


def config(home, name, model, tokenizer=None):
    return {
        "phase": "sft",
        "name": name,
        "output_dir": str(home / "runs"),
        "model": model,
        "tokenizer": None if tokenizer is None else str(home / tokenizer),
        "data": {
            "train": str(home / "world/corpus.jsonl"),
            "text": {"fields": {"completion": "text"}},
            "row_len": 128,
            "rows": 8,
        },
        "optimizer": {"learning_rate": 0.01},
        "loop": {"steps": 6, "checkpoint_every": 3, "tensorboard": False},
    }


def train(home, values):
    path = home / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["run", str(path)]) == 0
    return home / "runs" / values["name"]


SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
         "max_position_embeddings": 128, "rope_theta": 500.0}  # fmt: skip


@pytest.fixture(scope="module")
def ours(home):
    """Qwen3 with the toy vocabulary and Llama with the sentencepiece one, trained from nothing."""
    qwen = SHAPE | {"family": "qwen3", "tie_embeddings": False}
    return {
        "toy": train(home, config(home, "toy", {"init": qwen}, "world/tokenizer")),
        "pieces": train(
            home,
            config(home, "pieces", {"init": SHAPE | {"head_dim": 8}}, "vocabulary"),
        ),
    }


@pytest.fixture(scope="module")
def theirs(home):
    """A random Qwen3 written by transformers, with our tokenizer, then trained here."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(home / "vocabulary")
    shape = transformers.Qwen3Config(
        vocab_size=tokenizer.vocab_size + 6,  # embeddings are often padded to a round number
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rope_theta=1e6,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id, initializer_range=0.2,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(shape).save_pretrained(home / "theirs")
    tokenizer.save(str(home / "theirs"))
    return train(home, config(home, "continued", {"path": str(home / "theirs")}))


@contextlib.contextmanager
def silence():
    """Fails if anything warns, by `warnings` or by logging."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(), logging.getLogger("transformers")]  # which does not propagate
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not said


def load_theirs(folder):
    """By transformers' Auto classes, which must find nothing to complain about."""
    with silence():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
        )
    assert not any(info.values()), info
    return tokenizer, model.eval()


def logits_of_ours(folder, ids):
    """[T, V] float32, of one sequence."""
    from alignjax.models import load

    model, params = load(folder)
    hidden = alone.hidden(model, params, *alone.rows(ids, width=64))
    return np.asarray(hidden[0, : len(ids)] @ model.unembedding(params))


def greedy_of_theirs(folder, prompt, num_tokens):
    tokenizer, model = load_theirs(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    # The stop token comes from generation_config.json.
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=num_tokens)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), len(out)


def greedy_of_ours(capsys, folder, prompt, num_tokens):
    words = ["--prompt", prompt, "--temperature", "0", "--max-tokens", str(num_tokens), "--json"]
    assert main(["generate", str(folder), *words]) == 0
    record = json.loads(capsys.readouterr().out)
    return record["completion"], record["num_tokens"]


@pytest.mark.parametrize("name", ["toy", "pieces", "continued"])
def test_same_logits_same_ids_same_text(ours, theirs, capsys, name):
    run = theirs if name == "continued" else ours[name]
    metrics = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < metrics[1]["loss"]  # trained: nothing below is of random weights
    tokenizer, model = load_theirs(run / "model")
    mine = load_tokenizer(run / "model")
    for text in ("12*03=", "12*03-09=<think>12*03=36;wait:</think><answer>27</answer>"):
        ids = mine.encode(text)
        assert tokenizer(text)["input_ids"] == ids  # transformers adds nothing either
        assert tokenizer.decode(ids) == mine.decode(ids) == text
        ids = [mine.bos_id, *ids]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        found = logits_of_ours(run / "model", ids)
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    for prompt in ("12*03-09=", "30+"):
        expected = greedy_of_theirs(run / "model", prompt, 24)
        assert greedy_of_ours(capsys, run / "model", prompt, 24) == expected


@pytest.mark.parametrize("name", ["toy", "pieces", "continued"])
def test_ids_of_special_tokens_survive(ours, theirs, name):
    folder = (theirs if name == "continued" else ours[name]) / "model"
    mine = load_tokenizer(folder)
    ids = {"bos_token_id": mine.bos_id, "eos_token_id": mine.eos_id, "pad_token_id": mine.pad_id}
    # The toy vocabulary begins with BOS, EOS; sentencepiece with padding, BOS, EOS.
    assert list(ids.values()) == ([0, 1, 1] if name == "toy" else [1, 2, 0])
    tokenizer, model = load_theirs(folder)
    assert {key: getattr(tokenizer, key) for key in ids} == ids
    assert {key: getattr(model.config, key) for key in ids} == ids
    assert {key: getattr(model.generation_config, key) for key in ids} == ids
    assert json.loads((folder / "generation_config.json").read_text()) == ids
    if name == "continued":
        assert model.config.vocab_size == mine.vocab_size + 6
        assert (
            model.config.rope_parameters["rope_theta"] == 1e6 and model.config.tie_word_embeddings
        )


def test_export_gives_the_same_model(ours, tmp_path):
    run = ours["toy"]
    assert main(["export", str(run), str(tmp_path / "last")]) == 0
    assert main(["export", str(run), str(tmp_path / "third"), "--step", "3"]) == 0
    _, last = load_theirs(tmp_path / "last")
    _, model = load_theirs(run / "model")
    _, third = load_theirs(tmp_path / "third")
    ids = torch.tensor([load_tokenizer(run / "model").encode("<bos>12*03=")])
    with torch.no_grad():
        a, b, c = (m(ids).logits for m in (model, last, third))
    assert torch.equal(a, b) and (a - c).abs().max() > 1e-2


def test_export_in_bfloat16_and_in_shards(ours, tmp_path):
    """Half the bytes, each weight rounded once; transformers finds type and shards."""
    run, out = ours["toy"], tmp_path / "out"
    words = ["export", str(run), str(out), "--dtype", "bfloat16", "--max-shard-size", "20KB"]
    assert main(words) == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    with silence():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True
        )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    _, whole = load_theirs(run / "model")
    theirs = model.state_dict()
    for name, weight in whole.state_dict().items():
        assert torch.equal(theirs[name], weight.to(torch.bfloat16)), name


def test_a_published_tokenizer_and_its_template_survive(ours, real_data, tmp_path):
    """Qwen3's: 151,669 ids, a chat template with tools and thinking."""
    from alignjax.models import Model, ModelConfig, save

    published = real_data / "tokenizers/qwen3"
    mine = load_tokenizer(published)
    shape = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "num_layers": 1}
    model = Model(ModelConfig(family="qwen3", vocab_size=mine.vocab_size, **shape))
    ids = {"bos_token_id": mine.bos_id, "eos_token_id": mine.eos_id, "pad_token_id": mine.pad_id}
    save(tmp_path, model, model.init(jax.random.key(0)), extra_config=ids)
    mine.save(str(tmp_path))
    tokenizer, theirs = load_theirs(tmp_path)
    with silence():
        original = transformers.AutoTokenizer.from_pretrained(published)
    for name in ids:
        assert getattr(tokenizer, name) == getattr(original, name), name
        assert getattr(theirs.generation_config, name) == ids[name]
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    for options in ({"tokenize": False}, {"add_generation_prompt": True, "enable_thinking": False}):
        found = tokenizer.apply_chat_template(chat, **options)
        assert found == original.apply_chat_template(chat, **options)


def test_our_directory_goes_through_save_pretrained_and_back(ours, tmp_path):
    """What transformers writes of our model is read here again, weights unchanged."""
    run = ours["pieces"]
    tokenizer, model = load_theirs(run / "model")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = load_tokenizer(run / "model").encode("12*03=")
    assert load_tokenizer(tmp_path).encode("12*03=") == ids
    np.testing.assert_array_equal(logits_of_ours(tmp_path, ids), logits_of_ours(run / "model", ids))


def test_files_are_those_that_other_tools_read(ours):
    names = {p.name for p in Path(ours["pieces"], "model").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert os.environ.get("HF_HUB_OFFLINE") == "1"  # and nothing was fetched for it
