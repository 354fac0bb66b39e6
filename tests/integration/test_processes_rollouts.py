"""Several real processes sample in another layout than they train in, or on other devices."""

import signal

import pytest

from alignjax.cli.main import TERMINATED
from tests.integration.test_processes import Run, assert_same, folder, metrics_of

__all__ = ["folder"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["grpo", "ppo"])
def test_two_processes_sample_as_one_in_another_layout(folder, phase):
    layout = "rollout.mesh={data: 2, tensor: 2}"
    for number in (1, 2):
        run = Run(folder, number, phase, f"name={phase}_layout_{number}", layout)
        assert run.wait() == [0] * number, run.text()
    assert_same(*(metrics_of(folder, f"{phase}_layout_{number}") for number in (2, 1)))


AHEAD = (
    "mesh={data: 2}", "rollout.devices=2", "rollout.max_staleness=1",
    "algorithm.old_logps=trainer", "algorithm.importance_cap=2.0",
    "loop.checkpoint_every=2", "loop.eval_every=2",
)  # fmt: skip
"""One of the two devices of each process samples while the other trains, is saved and evaluated."""


def stale(folder, name):
    return [line["rollout/staleness/max"] for line in metrics_of(folder, name) if line["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["grpo", "ppo"])
def test_two_processes_sample_ahead_as_one(folder, phase):
    for number in (1, 2):
        run = Run(folder, number, phase, f"name={phase}_ahead_{number}", *AHEAD)
        assert run.wait() == [0] * number, run.text()
    assert_same(*(metrics_of(folder, f"{phase}_ahead_{number}") for number in (2, 1)))
    assert stale(folder, f"{phase}_ahead_2") == [0, 1, 1, 1, 1, 1]


@pytest.mark.slow
def test_two_processes_that_sample_in_turn_elsewhere_are_two_that_do_not(folder):
    ways = {"there": ("mesh={data: 2}", "rollout.devices=2"), "here": ("mesh={data: 4}",)}
    for name, options in ways.items():
        run = Run(folder, 2, "grpo", f"name={name}", *options)
        assert run.wait() == [0, 0], run.text()
    there, here = metrics_of(folder, "there"), metrics_of(folder, "here")
    assert stale(folder, "there") == [0] * 6
    for line in there:
        line.pop("rollout/staleness/max", None), line.pop("rollout/staleness/mean", None)
    assert_same(there, here)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_that_sample_ahead_stop_and_go_on(folder):
    """Together, by SIGTERM to one of them while both sample; then one goes on to the end."""
    steps = "loop.steps=30"
    whole = Run(folder, 2, "grpo", "name=whole_ahead", *AHEAD, steps)
    assert whole.wait() == [0, 0], whole.text()
    run = Run(folder, 2, "grpo", "name=parts_ahead", *AHEAD, steps)
    run.wait_for_step(folder / "runs/parts_ahead/metrics.jsonl", 5)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [TERMINATED, TERMINATED], run.text()
    for number in (2, 1):
        run = Run(folder, number, "grpo", "name=parts_ahead", *AHEAD, steps)
        if number == 2:
            run.wait_for_step(folder / "runs/parts_ahead/metrics.jsonl", 15)
            run.processes[0].kill()
            assert all(run.wait(60))
        else:
            assert run.wait() == [0], run.text()
        assert "resumed from step" in run.logs[0].read_text()
    assert_same(metrics_of(folder, "parts_ahead"), metrics_of(folder, "whole_ahead"))
