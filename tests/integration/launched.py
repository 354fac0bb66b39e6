"""Several real processes of one `alignjax run`, as their launcher would start them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignjax.train.metrics import TIMINGS
from tests.flags import xla_flags

REPO = Path(__file__).resolve().parents[2]
NUM_DEVICES = 4


class Run:
    """Processes of one `alignjax run`, with so many devices among them."""

    def __init__(self, folder, number, phase, *overrides, num_devices=NUM_DEVICES):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        flags = xla_flags(num_devices // number)
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

    def wait(self, seconds=800):
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
