"""What tests of the page share: files of tasks, the app in this process, a server in its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HOST = "http://127.0.0.1:8377"


def records(num, responses=3):
    return [
        {
            "prompt": f"Name some birds ({i})",
            "responses": [f"bird {i}.{r}" for r in range(responses)],
        }
        for i in range(num)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Server:
    """`alignjax label` as a process of its own, at a free port."""

    def __init__(self, *words, port=0):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "alignjax", "label", *map(str, words), "--port", str(port)],
            cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"http://\S+:(\d+)/\S*", line):
                self.url, self.port = found[0], int(found[1])
                return
        raise AssertionError("".join(self.said))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
