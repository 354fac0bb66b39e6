"""The page of the R1 recipe: whose figures it shows, and which transcripts."""

import json

import pytest

from alignjax.core.errors import UserError
from alignjax.recipes import r1_page

RUNS = ("zero", "dev2", "r1")


def sample(step, prompt, part, value, **more):
    return {"step": step, "split": "eval/sampled", "prompt": prompt, "parts": {part: value, **more},
            "completion": f"of {prompt} at {step}"}  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Each run has an evaluation at its start and at its end, in tenths by run and by end."""
    for i, run in enumerate(RUNS):
        rows, samples = [], []
        for step in (0, 10):
            share = i / 10 + step / 1000
            names = r1_page.PANELS.values()
            rows += [{"step": step, **{f"eval/sampled/{name}": share for name in names}}]
            rows += [{"step": step + 1, "loss": 1.0}]
            # Of what R1 solves "12+04=" gains most in language, and "b" in being right.
            samples += [
                sample(step, "12+03=", "accuracy", 1.0, language=1.0),
                sample(step, "12+04=", "accuracy", 1.0, language=float(run != "zero")),
                sample(step, "12+05=", "accuracy", 0.0, language=2.0 * (run == "r1")),
                sample(step, "copy a=", "general", 0.0),
                sample(step, "copy b=", "general", float(run != "zero")),
                sample(step, "copy c=", "general", float(run == "zero")),
                sample(step, "other", "format", 1.0),
                {"step": step, "prompt": "trained on", "parts": {"accuracy": 0.0}},
            ]
        (tmp_path / run).mkdir()
        for name, records in (("metrics", rows), ("samples", samples)):
            text = "".join(json.dumps(record) + "\n" for record in records)
            (tmp_path / run / f"{name}.jsonl").write_text(text)
    return {run: str(tmp_path / run) for run in RUNS}


def test_stages_are_those_that_the_evaluations_are_of(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(r1_page, "stages_picture", lambda *args, **_: drawn.append(args))
    r1_page.write(tmp_path / "page", seed=0, **runs)
    ((path, shares, (sums, requests)),) = drawn
    assert path == tmp_path / "page/r1.png"
    expected = {
        "base": 0.0, "Zero": 0.01, "Dev1": 0.1, "Dev2": 0.11, "Dev3": 0.2, "R1": 0.21,
    }  # fmt: skip
    assert list(shares) == list(r1_page.PANELS)
    assert all(list(by_stage) == list(expected) for by_stage in shares.values())
    assert shares["Unsafe answers"] == pytest.approx(expected)
    assert json.loads((tmp_path / "page/stages.json").read_text()) == shares
    assert [(t.title, t.completion, t.is_correct) for t in sums] == [
        ("Zero", "of 12+04= at 10", True), ("Dev2", "of 12+04= at 10", True),
        ("R1", "of 12+04= at 10", True),
    ]  # fmt: skip
    assert [(t.prompt, t.is_correct) for t in requests] == [
        ("copy b=", False), ("copy b=", True), ("copy b=", True)
    ]  # fmt: skip


def test_it_is_drawn(runs, tmp_path):
    r1_page.write(tmp_path / "page", seed=0, **runs)
    assert (tmp_path / "page/r1.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_show_nothing(runs, tmp_path):
    (tmp_path / "zero/samples.jsonl").write_text("")
    with pytest.raises(UserError, match="no sample with the reward 'accuracy' is shown; raise"):
        r1_page.write(tmp_path / "page", seed=0, **runs)
    (tmp_path / "dev2/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match=r"dev2: no evaluation in metrics.jsonl; set data.eval"):
        r1_page.write(tmp_path / "page", seed=0, **runs)
