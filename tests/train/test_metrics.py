"""metrics.jsonl and samples.jsonl: what they hold, and what a restart leaves of them."""

import json
import sys
from types import SimpleNamespace

import pytest

from alignjax.core.errors import UserError
from alignjax.train.metrics import JsonLines, MetricWriter, read_metrics, replace_file


def untold(warning):
    raise AssertionError(warning)


def opened(run_dir, **changes):
    options = {"last_step": -1, "tensorboard": False, "wandb_project": None, "warn": untold}
    return MetricWriter(run_dir, **{**options, **changes})


def write(path, *lines):
    path.write_text("".join(lines), encoding="utf-8")


def test_rewinding_drops_later_lines_and_one_half_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "n": i}) + "\n" for i, s in enumerate([0, 5, 5, 10, 15])]
    write(path, *lines, '{"step": 15, "n"')
    file = JsonLines(path, last_step=10, warn=untold)
    assert path.read_text() == "".join(lines[:4])
    file.write({"step": 15, "n": "new"})
    assert path.read_text() == "".join(lines[:4]) + '{"step": 15, "n": "new"}\n', "flushed"
    file.close()


@pytest.mark.parametrize("half", ['{"step": 5', '{"step": 5}', "\0\0\0"])
def test_the_end_that_was_half_written_is_dropped(tmp_path, half):
    """A line counts once its newline is there; even one that would be of a step to keep."""
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 5}\n', half)
    JsonLines(path, last_step=9, warn=untold).close()
    assert path.read_text() == '{"step": 5}\n'


def test_a_run_without_a_checkpoint_starts_again_from_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 0}\n', '{"step": 1}\n')
    JsonLines(path, last_step=-1, warn=untold).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("damage", ["\0\0\0", "{", "[]", "{}", "null"])
def test_a_damaged_line_is_told_and_what_is_before_it_kept(tmp_path, damage):
    """As a power cut leaves a file that was never synced."""
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 5}\n', damage + "\n", '{"step": 6}\n')
    told = []
    JsonLines(path, last_step=9, warn=told.append).close()
    assert path.read_text() == '{"step": 5}\n'
    assert told == [f"{path}:2 is damaged; this line and those after it are lost"]


def test_text_of_samples_survives(tmp_path):
    path = tmp_path / "s.jsonl"
    text = "a\nb\r\u2028c\x85é\x0b\x1c😀 half a pair: \udcff"
    file = JsonLines(path, last_step=-1, warn=untold)
    for step in (1, 2, 3):
        file.write({"step": step, "completion": text})
    file.close()
    JsonLines(path, last_step=2, warn=untold).close()
    kept = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert kept == [{"step": step, "completion": text} for step in (1, 2)]


def test_what_is_not_finite_becomes_null(tmp_path):
    writer = opened(tmp_path)
    writer.write(3, {"a": float("nan"), "b": float("-inf"), "c": 0.1}, [{"prompt": "p"}])
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 3, "a": None, "b": None, "c": 0.1}]
    line = (tmp_path / "samples.jsonl").read_text()
    assert json.loads(line) == {"step": 3, "prompt": "p"}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = opened(tmp_path, tensorboard=True)
    writer.write(3, {"loss": 0.25}, [])
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def values_on_the_board(run_dir):
    """(step, value) of every scalar, in the order of the files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # Records: length, checksum of it, the event, checksum of that.
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found += [(event.step, v.simple_value) for v in event.summary.value]
            if event.session_log.status:
                found.append((event.step, "restart"))
    return found


def test_tensorboard_is_rewound_and_gets_finite_numbers_only(tmp_path):
    writer = opened(tmp_path, tensorboard=True)
    writer.write(3, {"a": 0.25, "b": float("nan")}, [])
    writer.write(4, {"a": 0.5}, [])
    writer.close()
    opened(tmp_path, tensorboard=True, last_step=3).close()
    restarts = [(0, "restart"), (4, "restart")]
    assert values_on_the_board(tmp_path) == [restarts[0], (3, 0.25), (4, 0.5), restarts[1]]


def test_wandb_goes_on_as_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        writer = opened(tmp_path, wandb_project="mine")
        writer.write(3, {"loss": 0.25}, [])
        writer.close()
    first, second = calls[0], calls[3]
    assert first == second and first["resume"] == "allow" and first["project"] == "mine"
    assert calls[1:3] == [(3, {"loss": 0.25}), "finished"]


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"loop.wandb_project=mine: W&B is not installed .*pip"):
        opened(tmp_path, wandb_project="mine")


def test_replace_file_leaves_nothing_beside_it(tmp_path):
    replace_file(tmp_path / "x", b"old")
    replace_file(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"new")]
