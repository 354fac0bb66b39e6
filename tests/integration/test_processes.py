"""Several real processes train as one does, stop together, and go on in another number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignjax.cli.main import TERMINATED
from alignjax.core.config import dump
from alignjax.recipes import chains
from alignjax.train.metrics import TIMINGS

REPO = Path(__file__).resolve().parents[2]
NUM_DEVICES = 4
RANKINGS = [
    {"prompt": f"{i}+{j}=", "responses": [f"{i + j}", f"{i + j + 1}"], "ranks": [1, 2]}
    for i in range(1, 7)
    for j in range(1, 7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"num_questions": 200, "num_drills": 100, "num_train": 8, "num_test": 4}
    chains.write(folder / "world", seed=0, **sizes)
    (folder / "rankings.jsonl").write_text("\n".join(map(json.dumps, RANKINGS)))
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 128}
    common = {
        "tokenizer": "world/tokenizer",
        "model": {"init": model},
        "mesh": {"data": 2, "fsdp": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "loop": {"steps": 6, "checkpoint_every": 4, "tensorboard": False},
    }
    texts = {"train": "world/corpus.jsonl", "eval": "world/corpus.jsonl",
             "text": {"fields": {"completion": "text"}}, "row_len": 128, "rows": 8}  # fmt: skip
    ranked = {"train": "rankings.jsonl", "eval": "rankings.jsonl", "row_len": 64, "num_prompts": 8}
    (folder / "lengths.py").write_text("def score(completion):\n    return len(completion) / 10\n")
    fields = {"prompt": "prompt", "reference": "reference"}
    rl = {
        "data": {"train": "world/train.jsonl", "eval": "world/test.jsonl",
                 "text": {"fields": fields}},
        "rewards": {"functions": {"length": {"function": "lengths.py:score"}}},
        "evaluation": {"num_problems": 4},
    }  # fmt: skip
    rollout = {"num_prompts": 8, "max_prompt_tokens": 20, "max_tokens": 16}
    phases = {
        "sft": {"data": texts},
        "reward": {"data": ranked},
        "preference": {"data": ranked, "losses": {"dpo": {}}, "cache_dir": "cache"},
        "grpo": {**rl, "rollout": rollout | {"group_size": 4}, "algorithm": {"kl_coef": 0.05}},
        "ppo": {**rl, "rollout": rollout},
    }
    for phase, values in phases.items():
        tree = {"phase": phase, "name": f"{phase}_1", **common, **values}
        (folder / f"{phase}.yaml").write_text(dump(tree))
    return folder


class Run:
    """Processes of one `alignjax run`, with 4 devices among them."""

    def __init__(self, folder, number, phase, *overrides):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        flags = f"--xla_force_host_platform_device_count={NUM_DEVICES // number}"
        env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(REPO)}
        if number > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(number),
            }
        command = [sys.executable, "-m", "alignjax", "run", f"{phase}.yaml", *overrides]
        self.logs = [folder / f"{port}_{i}.log" for i in range(number)]
        self.processes = [
            subprocess.Popen(command, cwd=folder, env=env | {"JAX_PROCESS_ID": str(i)},
                             stdout=log.open("w"), stderr=subprocess.STDOUT)
            for i, log in enumerate(self.logs)
        ]  # fmt: skip

    def wait(self, seconds=400):
        """The exit codes."""
        until = time.monotonic() + seconds
        try:
            return [p.wait(until - time.monotonic()) for p in self.processes]
        finally:
            for p in self.processes:
                p.kill()

    def wait_for_step(self, metrics, step):
        until = time.monotonic() + 400
        while time.monotonic() < until:
            if metrics.exists() and f'"step": {step},' in metrics.read_text():
                return
            assert all(p.poll() is None for p in self.processes), self.text()
            time.sleep(0.02)
        pytest.fail(self.text())

    def text(self):
        return "\n".join(log.read_text() for log in self.logs)


def metrics_of(folder, name):
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def assert_same(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            close = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
            assert one[key] == close, (other["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sft", "reward", "preference", "grpo", "ppo"])
def test_two_processes_train_as_one(folder, phase):
    for number in (1, 2):
        run = Run(folder, number, phase, f"name={phase}_{number}")
        assert run.wait() == [0] * number, run.text()
    assert_same(metrics_of(folder, f"{phase}_2"), metrics_of(folder, f"{phase}_1"))
    weights = [
        (folder / f"runs/{phase}_{n}/model/model.safetensors").stat().st_size for n in (1, 2)
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_they_stop_together_and_go_on_in_another_number(folder):
    """SIGTERM to one of two; then four, one of which is killed; then one, to the end."""
    steps = "loop.steps=40"
    whole = Run(folder, 1, "sft", "name=whole", steps)
    assert whole.wait() == [0], whole.text()
    metrics = folder / "runs/parts/metrics.jsonl"

    run = Run(folder, 2, "sft", "name=parts", steps)
    run.wait_for_step(metrics, 6)
    run.processes[1].send_signal(signal.SIGTERM)
    codes = run.wait()
    assert codes == [TERMINATED, TERMINATED], run.text()
    assert "saved step" in run.logs[0].read_text()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (folder / f"runs/parts/checkpoints/{last}").is_dir()

    run = Run(folder, 4, "sft", "name=parts", steps)
    run.wait_for_step(metrics, last + 6)
    run.processes[2].kill()
    killed = time.monotonic()
    codes = run.wait(60)
    assert time.monotonic() - killed < 60 and all(codes), codes
    assert f"resumed from step {last}" in run.logs[0].read_text()

    run = Run(folder, 1, "sft", "name=parts", steps)
    assert run.wait() == [0], run.text()
    assert_same(metrics_of(folder, "parts"), metrics_of(folder, "whole"))
