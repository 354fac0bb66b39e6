"""Directories, ids of the Hub, and a cache made by hand; nothing here asks the network."""

import sys
from pathlib import Path

import jax
import pytest

from alignjax.core.errors import UserError
from alignjax.core.hub import MODEL_FILES, TOKENIZER_FILES, resolve
from alignjax.models import Model, ModelConfig, load, load_eos_ids, save
from alignjax.phases.sft import SftConfig
from alignjax.recipes.stage import digests
from alignjax.text import load_tokenizer, vocab_tokenizer

hub = pytest.importorskip("huggingface_hub", reason="needs the hf extra")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and a working directory beside it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def cached(cache, owner="Acme", name="Tiny-0.1B", files=("config.json",)):
    folder = cache / f"models--{owner}--{name}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_a_cached_model_is_its_snapshot(cache):
    snapshot = cached(cache)
    assert resolve("Acme/Tiny-0.1B") == snapshot
    assert resolve("Acme/Tiny-0.1B", TOKENIZER_FILES) == snapshot


def test_what_is_here_goes_first(cache):
    cached(cache)
    Path("Acme/Tiny-0.1B").mkdir(parents=True)
    assert resolve("Acme/Tiny-0.1B") == Path("Acme/Tiny-0.1B")
    Path("Acme/Tiny-0.1B").rmdir()  # and a name that is missing in a directory is a slip of the pen
    assert resolve("Acme/Tiny-0.1B") == Path("Acme/Tiny-0.1B")
    Path("Acme").rmdir()
    assert resolve("Acme/Tiny-0.1B").name == COMMIT


@pytest.mark.parametrize(
    "path",
    ["model", "a/b/c", "./a/b", "../b", "/a/b", "a/", "/a", "a/.b", "-a/b", "a b/c", "a\\b/c"],
)
def test_these_are_paths(cache, monkeypatch, path):
    monkeypatch.setattr(hub, "snapshot_download", None)
    assert resolve(path) == Path(path)


def test_home(cache, monkeypatch):
    monkeypatch.setenv("HOME", str(cache))
    assert resolve("~/model") == cache / "model"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (MODEL_FILES, {"config.json", "model-1-of-2.safetensors", "tokenizer.model", "a.jinja"}),
        (TOKENIZER_FILES, {"config.json", "tokenizer.model", "a.jinja"}),
    ],
)
def test_what_is_downloaded_cannot_run(cache, monkeypatch, files, wanted):
    """By the rules of huggingface_hub itself."""
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return "there"

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("Acme/Tiny-0.1B", files) == Path("there")
    assert asked.pop("name") == "Acme/Tiny-0.1B"
    there = {
        "config.json", "model-1-of-2.safetensors", "tokenizer.model", "a.jinja",
        "pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/params.json",
        "original/weights.safetensors", "README.md", "weights.pth", "flax_model.msgpack",
    }  # fmt: skip
    assert set(hub.utils.filter_repo_objects(there, **asked)) == wanted


def test_offline_and_not_cached(cache):
    with pytest.raises(UserError, match=r"^Acme/None: no such directory, and not .*HF_HUB_OFFLINE"):
        resolve("Acme/None")


def test_no_such_model(cache, monkeypatch):
    def download(name, **kwargs):
        raise OSError("404 Client Error\nmore")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"Hub \(OSError: 404 Client Error\); check the name"):
        resolve("Acme/None")


def test_without_huggingface_hub(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"install huggingface_hub \(pip install 'alignjax\[hf\]'"):
        resolve("Acme/Tiny-0.1B")
    assert resolve("here") == Path("here"), "directories need nothing"


def test_models_tokenizers_and_runs_take_ids(cache):
    """And a run remembers which commit it began with."""
    snapshot = cached(cache, files=())
    model = Model(ModelConfig.tiny(4))
    save(snapshot, model, model.init(jax.random.key(0)), extra_config={"eos_token_id": 1})
    vocab_tokenizer(["a", "<eos>", "<pad>", "b"], bos=None).save(str(snapshot))
    name = "Acme/Tiny-0.1B"
    assert load(name)[0] == model
    assert load_eos_ids(name) == (1,)
    assert load_tokenizer(name).vocab_size == 4
    config = SftConfig.model_validate({
        "phase": "sft", "name": "x", "model": {"path": name}, "tokenizer": name,
        "data": {"train": "no.jsonl", "text": {"fields": {"completion": "text"}}},
    })  # fmt: skip
    assert digests(config) == {f"model.path {name}": COMMIT, f"tokenizer {name}": COMMIT}
