"""docs/guide.md from top to bottom: its files are written, its commands run, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignjax.cli.run import check
from alignjax.core.config import build, loads
from alignjax.evals.run import EvalConfig
from alignjax.evals.win_rate import CompareConfig
from alignjax.rewards.constitution import Constitution
from tests.flags import xla_flags

REPO = Path(__file__).resolve().parents[2]
GUIDE = (REPO / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def test_its_configs_are_valid():
    configs = {name: text for language, name, text in BLOCKS if language == "yaml"}
    assert len(configs) >= 3
    build(CompareConfig, loads(configs.pop("compare.yaml"), ["a=one", "b=other"]))
    build(EvalConfig, loads(configs.pop("additions.yaml"), ["model=one"]))
    build(Constitution, loads(configs.pop("constitution.yaml")))
    for text in configs.values():
        check(loads(text))


@pytest.mark.slow
def test_it_runs(tmp_path):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, words in (("python", '"$@"'), ("alignjax", '-m alignjax "$@"')):
        script = binaries / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}\n')
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": xla_flags(),
    }
    # Files first: a command may refer to one that stands further down.
    for language, name, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(text)
        else:
            assert language == "bash"
    for _, name, text in BLOCKS:
        if name:
            continue
        done = subprocess.run(
            ["bash", "-eu", "-c", text], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        print(f"$ {text}{done.stdout}{done.stderr}")
    assert (tmp_path / "runs" / "my_grpo" / "eval" / "eval.json").is_file()
