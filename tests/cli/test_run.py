"""`alignjax run`: a config and overrides in, a run directory out; a second time it says so."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from alignjax.cli.main import TERMINATED, main
from alignjax.core.yaml_tree import load

REPO = Path(__file__).resolve().parents[2]
PHASE = """\
phase: sft
name: tiny
model: {{init: {{hidden_size: 16, num_heads: 2, num_layers: 1}}}}
tokenizer: {world}/tokenizer
data:
  train: {world}/corpus.jsonl
  text: {{fields: {{completion: text}}}}
  row_len: 128
  rows: 8
loop: {{steps: 3, checkpoint_every: 1}}
"""


@pytest.fixture
def phase(trained, tmp_path, monkeypatch):
    """The config of one phase in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(PHASE.format(world=trained.root / "world"))
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


RUNNABLE = [p for p in (REPO / "configs").rglob("*.yaml") if p.parent.name != "tasks"]


@pytest.mark.parametrize("path", sorted(RUNNABLE), ids=lambda p: p.stem)
def test_every_config_that_ships_is_valid_and_says_how_to_run_it(path, capsys):
    assert main(["run", str(path), "--print-config"]) == 0
    assert capsys.readouterr().err == ""
    head = path.read_text().split("\n\n")[0].lower()
    if path.parent.name != "recipes":
        words = ["# hardware", "# time", "# expect", "# command"]
        assert all(f"\n{word}" in head for word in words)
        assert f"alignjax run configs/{path.parent.name}/{path.name}" in head


def test_what_a_recipe_leaves(trained):
    assert sorted(p.name for p in (trained.root / "world").iterdir()) == [
        "config.yaml", "corpus.jsonl", "inputs.json", "test.jsonl", "tokenizer", "train.jsonl"
    ]  # fmt: skip
    for stage in ("base", "grpo"):
        names = {p.name for p in (trained.root / stage).iterdir()}
        assert names >= {"config.yaml", "inputs.json", "metrics.jsonl", "samples.jsonl",
                         "checkpoints", "model", "report.png", "tensorboard"}  # fmt: skip
        model = {p.name for p in (trained.root / stage / "model").iterdir()}
        assert model == {"config.json", "generation_config.json", "model.safetensors",
                         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    base = lines(trained.root / "base/metrics.jsonl")
    assert [x["step"] for x in base] == [0, 20, 30] and base[2]["loss"] < base[1]["loss"]
    rl = lines(trained.root / "grpo/metrics.jsonl")
    assert [x["step"] for x in rl] == [0, 3, 4]
    assert max(x.get("sampling/sampling_logp_difference/max", 0) for x in rl) < 1e-5
    assert {x["split"] for x in lines(trained.root / "grpo/samples.jsonl") if x["step"] == 0} == {
        "eval/sampled", "eval/greedy"
    }  # fmt: skip
    assert sorted(p.name for p in (trained.root / "grpo/checkpoints").iterdir()) == ["2", "4"]


def test_the_config_that_a_run_writes_is_a_config(trained, tmp_path):
    path = trained.root / "grpo/config.yaml"
    assert load(path).values == yaml.safe_load(path.read_text())
    # Taken up as it is, it finds its own run finished.
    assert main(["run", str(path)]) == 0


def test_a_second_run_says_that_it_is_done_and_touches_nothing(trained, capsys):
    before = {
        p: p.stat().st_mtime_ns
        for p in trained.root.rglob("*")
        if p.suffix != ".lock" and p.name != ".lock"
    }
    assert main(trained.command) == 0
    err = capsys.readouterr().err
    assert re.findall(r"^(\w+): .* is there already: nothing to do$", err, re.M) == [
        "world", "base", "grpo"
    ]  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_run_of_another_config_is_refused_with_the_difference(trained, capsys):
    before = {p: p.read_bytes() for p in trained.root.rglob("*") if p.is_file()}
    words = [*trained.command, "stages.grpo.optimizer.learning_rate=5e-5", "stages.grpo.seed=8"]
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[2:] == [
        f"alignjax: {trained.root}/grpo holds a run of another config (there -> now):",
        "  seed: 0 -> 8",
        "  optimizer.learning_rate: 0.001 -> 5.0e-05",
        "choose another name (name=...), undo the change, or delete the directory",
    ]
    assert {p: p.read_bytes() for p in before} == before


def test_print_config_of_a_phase(phase, capsys):
    words = ["run", "tiny.yaml", "optimizer.learning_rate=1e-2", "--print-config", "name=other"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    origins = {
        tuple(row.split("#")[0].split()): row.partition("# ")[2]
        for row in shown.splitlines() if "#" in row
    }  # fmt: skip
    assert origins["name:", "other"] == "command line"
    assert origins["learning_rate:", "0.01"] == "command line"
    assert origins["row_len:", "128"] == "tiny.yaml:8"
    assert origins["steps:", "3"] == "tiny.yaml:10"
    assert origins["b2:", "0.95"] == "default"
    assert not (phase / "runs").exists()
    # What it shows is the whole config: it can be run as it stands.
    (phase / "shown.yaml").write_text(shown)
    assert main(["run", "shown.yaml", "--print-config"]) == 0
    again = capsys.readouterr().out
    assert [r.split("#")[0].split() for r in again.splitlines()] == [
        r.split("#")[0].split() for r in shown.splitlines()
    ]


def test_print_config_of_a_recipe(trained, capsys):
    assert main([*trained.command, "seed=7", "--print-config"]) == 0
    rows = [(r.split("#")[0].rstrip(), r.partition("# ")[2]) for r in
            capsys.readouterr().out.splitlines()]  # fmt: skip
    shown = dict(rows)
    smoke = trained.command[1]
    line = Path(smoke).read_text().splitlines().index("    optimizer: {learning_rate: 1e-3}") + 1
    assert shown["      learning_rate: 0.001"] == f"{smoke}:{line}"
    assert shown["      steps: 4"] == "command line"
    assert ("    seed: 7", "command line") in rows  # of a stage: the recipe's
    assert shown["    tokenizer: null"] == "default"


def test_continues_where_it_was_stopped(phase, capsys):
    """A real process, stopped by SIGTERM, says how to continue; another is kept out meanwhile."""
    command = [sys.executable, "-m", "alignjax", "run", "tiny.yaml", "loop.steps=100000"]
    path = os.pathsep.join([str(REPO), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    env = os.environ | {"PYTHONPATH": path}  # the working directory is another
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        metrics = phase / "runs/tiny/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert main(["run", "tiny.yaml", "loop.steps=100000"]) == 2
        assert capsys.readouterr().err == (
            "alignjax: runs/tiny: another process is at work in it\n"
        )
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == TERMINATED and "Traceback" not in err
    saved = re.search(r"saved step (\d+); (.*) continues from there$", err, re.M)
    assert saved[2] == "alignjax run tiny.yaml loop.steps=100000"
    steps = int(saved[1])
    assert str(steps) in os.listdir(phase / "runs/tiny/checkpoints")
    assert not (phase / "runs/tiny/model").exists()
    # The same config goes on; here with the end in sight, which is another config.
    assert main(["run", "tiny.yaml", f"loop.steps={steps + 2}"]) == 2
    assert f"loop.steps: 100000 -> {steps + 2}" in capsys.readouterr().err
    assert str(steps) in os.listdir(phase / "runs/tiny/checkpoints")
