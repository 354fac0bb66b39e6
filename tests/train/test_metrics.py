"""metrics.jsonl and samples.jsonl: what they hold, and what a restart leaves of them."""

import json

import pytest

from alignjax.train.metrics import JsonLines, MetricWriter, read_metrics, replace_file


def write(path, *lines):
    path.write_text("".join(lines), encoding="utf-8")


def test_rewinding_drops_later_lines_and_one_half_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "n": i}) + "\n" for i, s in enumerate([0, 5, 5, 10, 15])]
    write(path, *lines, '{"step": 15, "n"')
    file = JsonLines(path, last_step=10)
    assert path.read_text() == "".join(lines[:4])
    file.write({"step": 15, "n": "new"})
    assert path.read_text() == "".join(lines[:4]) + '{"step": 15, "n": "new"}\n', "flushed"
    file.close()


@pytest.mark.parametrize("half", ['{"step": 5', '{"step": 5}', "\0\0\0"])
def test_the_end_that_was_half_written_is_dropped(tmp_path, half):
    """A line counts once its newline is there; even one that would be of a step to keep."""
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 5}\n', half)
    JsonLines(path, last_step=9).close()
    assert path.read_text() == '{"step": 5}\n'


def test_a_run_without_a_checkpoint_starts_again_from_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 0}\n', '{"step": 1}\n')
    JsonLines(path, last_step=-1).close()
    assert path.read_text() == ""


def test_text_of_samples_survives(tmp_path):
    path = tmp_path / "s.jsonl"
    text = "a\nb\r\u2028c\x85é\x0b\x1c😀"
    file = JsonLines(path, last_step=-1)
    for step in (1, 2, 3):
        file.write({"step": step, "completion": text})
    file.close()
    JsonLines(path, last_step=2).close()
    kept = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert kept == [{"step": step, "completion": text} for step in (1, 2)]


def test_what_is_not_finite_becomes_null(tmp_path):
    writer = MetricWriter(tmp_path, last_step=-1, tensorboard=False, wandb_project=None)
    writer.write(3, {"a": float("nan"), "b": float("-inf"), "c": 0.1}, [{"prompt": "p"}])
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 3, "a": None, "b": None, "c": 0.1}]
    line = (tmp_path / "samples.jsonl").read_text()
    assert json.loads(line) == {"step": 3, "prompt": "p"}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = MetricWriter(tmp_path, last_step=-1, tensorboard=True, wandb_project=None)
    writer.write(3, {"loss": 0.25}, [])
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_replace_file_leaves_nothing_beside_it(tmp_path):
    replace_file(tmp_path / "x", b"old")
    replace_file(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"new")]
