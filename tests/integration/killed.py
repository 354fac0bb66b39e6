"""A recipe whose data phase is killed with SIGKILL, twice, beside one that is left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.flags import xla_flags

REPO = Path(__file__).resolve().parents[2]


def start(folder):
    """Runs r.yaml in a folder, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "alignjax", "run", "r.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": xla_flags()},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_and_continue(folder, stage, output, at, names):
    """Runs folder/whole to its end, and folder/cut with a kill as soon as so many prompts (`at`)
    are done; asserts that the files `names` of the runs are the same.

    Args:
      stage: the data phase, whose file `output` must not be there when it is killed.
    """
    whole = start(folder / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    progress = folder / "cut" / "runs" / "r" / stage / "progress.json"
    for num in at:
        process = start(folder / "cut")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if progress.exists():
                done = json.loads(progress.read_text())["state"]["counts"]["num_prompts"]
                if done >= num:
                    break
            time.sleep(0.002)
        assert process.poll() is None, "killed before the end"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not progress.with_name(output).exists()
    last = start(folder / "cut")
    assert last.wait(timeout=300) == 0, last.stderr.read()
    for name in names:
        one, other = (folder / f / "runs" / "r" / name for f in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes(), name
