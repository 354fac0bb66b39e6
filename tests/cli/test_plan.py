"""`alignjax plan`: what it says of a config, from config.json files and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignjax.cli.main import main
from alignjax.plan import local_chip, topology
from alignjax.plan.chips import Chip

REPO = Path(__file__).resolve().parents[2]
TINY = """
name: tiny
stages:
  base:
    phase: sft
    tokenizer: nowhere
    model: {init: {vocab_size: 32, hidden_size: 16, num_layers: 2, num_heads: 2}}
    mesh: {fsdp: -1}
    data: {train: nowhere.jsonl, text: {fields: {completion: text}}, row_len: 16, rows: 8}
    loop: {steps: 36}
  more:
    phase: sft
    model: {path: "${base}/model"}
    mesh: {fsdp: -1}
    data: {train: nowhere.jsonl, text: {fields: {completion: text}}, row_len: 16, rows: 8}
    loop: {steps: 10}
  sampled:
    phase: label
    responses: nowhere.jsonl
    judge: {model: {path: "${more}/model"}}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def chip(monkeypatch):
    made = Chip("cpu", 1e12, 8e9, 1e11, 1e11, 1e11)
    monkeypatch.setattr(local_chip, "measured_cpu", lambda: made)
    return made


def test_a_recipe_on_local_devices(config, chip, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", config, "--topology", "local:8", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "base (phase sft): mesh fsdp 8" in text and "train step" in text
    assert text.count("  fits\n") == 2
    assert "sampled: not planned: phase label of responses that are read" in text
    assert "all stages: at least" in text and "device-hours" in text and "chip-hours" not in text
    plan = json.loads(out.read_text())
    base, more = plan["stages"]
    (step,) = base["programs"]
    # The second stage's model has the shape of what the first one writes.
    assert [more["programs"][0][key] for key in ("memory", "flops")] == [
        step["memory"], step["flops"],
    ]  # fmt: skip
    assert step["argument_bytes"] == step["compiler_argument_bytes"]
    assert step["seconds"] == max(step[f"{name}_s"] for name in ("compute", "hbm", "ici", "dcn"))
    assert base["iteration_s"] == step["seconds"]
    assert base["tokens_per_iteration"] == 8 * 16
    assert base["tokens_per_s"] == pytest.approx(8 * 16 / step["seconds"])
    assert base["chip_hours"] == pytest.approx(36 * step["seconds"] * 8 / 3600)
    assert plan["chip_hours"] == pytest.approx(base["chip_hours"] + more["chip_hours"])
    assert base["limit_bytes"] == pytest.approx(0.98 * chip.hbm_bytes / 8)
    assert plan["fits"] and plan["num_devices"] == 8


def test_one_stage_that_does_not_fit(config, chip, monkeypatch, capsys):
    monkeypatch.setattr(local_chip, "measured_cpu", lambda: chip._replace(hbm_bytes=8e3))
    words = ["plan", config, "--topology", "local", "--stage", "base", "--no-search"]
    assert main(words) == 3
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5e"], "--topology 'v5e': expected CHIP:SHAPE, such as v5e:16x16"),
        (["--topology", "local", "--slices", "0"], "--slices 0: expected at least 1"),
        (["--topology", "local", "--stage", "none"], "--stage none: expected one of base, more"),
        (["--topology", "local:9"], "this machine has 8 device(s)"),
        (["--topology", "local", "--json", "no/where.json"], "there is no directory no"),
        (["--topology", "local", "--model-config", "x"], "expected MODEL=FILE"),
        (
            ["--topology", "local", "stages.base.mesh.tensor=3"],
            "does not fit 8 device(s)",
        ),
        (
            ["--topology", "local", "stages.base.data.rows=4"],
            "base: 4 rows in a micro-batch do not divide over 8 devices",
        ),
    ],
)
def test_what_is_refused(config, chip, words, message, capsys):
    assert main(["plan", config, *words]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu(config, monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert main(["plan", config, "--topology", "v5e:4x4"]) == 2
    assert "pip install 'alignjax[plan]'" in capsys.readouterr().err


def test_a_model_of_which_nothing_is_known(config, chip, tmp_path, capsys):
    words = ["plan", config, "--topology", "local", "--stage", "more"]
    words += [f"stages.more.model.path={tmp_path}/gone"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "no such file" in error and f"--model-config {tmp_path}/gone=FILE" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "num_devices"), [("v5e:2x2", 4), ("2x v5e:2x2", 8), ("tpu7x:2x2x1", 8)]
)
def test_tpus_that_are_not_there(config, tmp_path, where, num_devices):
    pytest.importorskip("libtpu", reason="pip install 'alignjax[plan]'")
    out = tmp_path / "plan.json"
    words = ["plan", config, "--topology", where, "--stage", "base", "--json", str(out)]
    mesh = ["stages.base.mesh.data=-1", "stages.base.mesh.fsdp=2"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "alignjax", *words, *mesh],
        capture_output=True, text=True, cwd=REPO, env=environment, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(out.read_text())
    assert plan["num_devices"] == num_devices
    (stage,) = plan["stages"]
    (step,) = stage["programs"]
    assert stage["fits"] and step["flops"] > 0 and step["seconds"] > 0
    # The compiler pads arrays to tiles: never less than what they hold.
    assert step["argument_bytes"] <= step["compiler_argument_bytes"]
    crossing = [each for each in step["collectives"] if each["crosses_slices"]]
    assert bool(crossing) == (where == "2x v5e:2x2")
