"""`alignjax export`: a checkpoint's weights as a Hugging Face directory."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from alignjax.cli.export import _size
from alignjax.cli.main import main


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_last_checkpoint_is_the_model_of_the_run(trained, tmp_path, capsys):
    run = trained.root / "grpo"
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'} from step 4\n"
    names = sorted(p.name for p in (run / "model").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_an_earlier_step_has_other_weights(trained, tmp_path, capsys):
    run = trained.root / "grpo"
    assert main(["export", str(run), str(tmp_path / "a/b"), "--step", "2"]) == 0
    assert capsys.readouterr().out.endswith("from step 2\n")
    earlier, last = weights(tmp_path / "a/b"), weights(run / "model")
    first = weights(trained.root / "base/model")
    assert earlier.keys() == last.keys() == first.keys()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        # Adam moves by about the learning rate, 1e-3, in a step: between, and towards the last.
        moved = [np.abs(w[name] - first[name]).max() for w in (earlier, last)]
        assert 0 < moved[0] < moved[1] < 1e-2


def test_ids_of_special_tokens_are_in_the_configs(trained, tmp_path):
    assert main(["export", str(trained.root / "base"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    assert generation == ids and config.items() >= ids.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/nowhere", "out"], "no config.yaml; expected the directory of a run"),
        (["{root}", "out"], "no config.yaml; expected the directory of a run"),
        (["{root}/grpo", "."], ". exists already; choose another directory or delete it"),
        (["{root}/grpo", "out", "--step", "3"], "no checkpoint of step 3; there are 2, 4"),
        (["{root}/grpo", "out", "--adapter"], "(no model.lora), so there is no adapter: export th"),
        (["{root}/world", "out"], "config.yaml: phase 'files' has no checkpoints"),
    ],
)  # fmt: skip
def test_faults(trained, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(word.format(root=trained.root) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("alignjax: ") and message in err and err.count("\n") == 1
    assert out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 500 * 10**6), ("1.5KB", 1500)]
)
def test_sizes(text, size):
    assert _size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1GB", "5 TB", "1e3KB", "."])
def test_what_is_no_size(trained, tmp_path, capsys, text):
    words = ["export", str(trained.root / "grpo"), str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*words, f"--max-shard-size={text}"])
    assert f"{text!r}: expected a size such as 500MB or 5GB" in capsys.readouterr().err
