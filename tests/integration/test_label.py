"""`phase: label` in real processes: one that is killed with SIGKILL ends as one that is not, and
the judge is asked nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flags import xla_flags
from tests.rewards.judge_server import Server, says, waits

REPO = Path(__file__).resolve().parents[2]
KEY = "sk-nobody-may-see-this"
CONFIG = """
phase: label
name: labels
responses: responses.jsonl
num_prompts: 3
judge:
  http: {{url: "{url}", model: m, concurrency: 2, key_env: JUDGE_KEY}}
  cache: {cache}
"""


def reply(count, body):
    """The longer response is better, after a while."""
    text = body["messages"][-1]["content"]
    first, second = (text.partition(f"[response {option} ")[2].split("\n")[1] for option in "AB")
    return waits(0.1, says("A" if len(first) > len(second) else "B"))


@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
        lines = [
            json.dumps(
                {"prompt": f"p{i}", "responses": ["x" * (i % 5 + 1), "y" * (i % 3 + 2), "z"]}
            )
            for i in range(14)
        ]
        (tmp_path / folder / "responses.jsonl").write_text("\n".join(lines) + "\n")

    def start(folder, server):
        cache = tmp_path / folder / "judge.sqlite"
        config = CONFIG.format(url=server.url, cache=cache)
        (tmp_path / folder / "label.yaml").write_text(config)
        return subprocess.Popen(
            [sys.executable, "-m", "alignjax", "run", "label.yaml"],
            cwd=tmp_path / folder,
            env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": xla_flags(), "JUDGE_KEY": KEY},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    with Server(reply) as server:
        num_questions = 14 * 3 * 2
        whole = start("whole", server)
        assert whole.wait(timeout=300) == 0, whole.stderr.read()
        assert len(server.asked) == num_questions

        server.asked.clear()
        server.answered.clear()
        said = ""
        for num in (7, 40):  # Questions that are answered when the process is killed, at least.
            process = start("cut", server)
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                if len(server.answered) >= num:
                    break
                time.sleep(0.01)
            assert process.poll() is None, "killed before the end"
            os.killpg(process.pid, signal.SIGKILL)
            said += process.communicate()[1]
            assert not (tmp_path / "cut/runs/labels/preferences.jsonl").exists()
        last = start("cut", server)
        said += last.communicate(timeout=300)[1]
        assert last.returncode == 0, said
        # Those that were under way when it was killed, two at a time, have to be asked again.
        assert num_questions <= len(server.asked) <= num_questions + 2 * 2
        assert len(set(server.answered)) == num_questions
        again = start("cut", server)
        assert again.wait(timeout=300) == 0 and len(server.asked) <= num_questions + 2 * 2
    for name in ("preferences.jsonl", "label.json"):
        one, other = (tmp_path / folder / "runs/labels" / name for folder in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes(), name
    assert KEY not in said and {f"Bearer {KEY}"} == set(server.keys)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [p for p in files if KEY.encode() in p.read_bytes()]
