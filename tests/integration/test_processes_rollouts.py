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


BEHIND = (
    "mesh={data: 2}", "rollout.max_staleness=1",
    "algorithm.old_logps=trainer", "algorithm.importance_cap=2.0",
    "loop.checkpoint_every=2", "loop.eval_every=2",
)  # fmt: skip
AHEAD = (*BEHIND, "rollout.devices=2")
"""One of the two devices of each process samples while the other trains, is saved and evaluated."""
FAR = {
    2: (*BEHIND, "rollout.processes=1"),
    4: (*BEHIND, "rollout.processes=2", "rollout.mesh={tensor: 2}"),
}
"""As many processes: half of them train, the others sample."""


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
@pytest.mark.parametrize("phase", ["grpo", "ppo"])
def test_processes_that_sample_for_others_are_one_that_does_both(folder, phase):
    run = Run(folder, 1, phase, f"name={phase}_near", *AHEAD)
    assert run.wait() == [0], run.text()
    for number, options in FAR.items():
        name = f"{phase}_far_{number}"
        run = Run(folder, number, phase, f"name={name}", *options)
        assert run.wait() == [0] * number, run.text()
        assert_same(metrics_of(folder, name), metrics_of(folder, f"{phase}_near"))
        assert (folder / f"runs/{name}/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["grpo", "ppo"])
def test_a_process_of_one_device_samples_for_one(folder, phase):
    """With what else changes in PPO. JAX calls programs of a single device by a way of its own."""
    more = ("algorithm.scale_scores=true", "algorithm.kl_control=adaptive",
            "algorithm.kl_target=0.1", "algorithm.kl_horizon=20")  # fmt: skip
    more = (*BEHIND, "mesh={data: 1}", *(more if phase == "ppo" else ()))
    for number, way in ((1, "rollout.devices=1"), (2, "rollout.processes=1")):
        run = Run(folder, number, phase, f"name={phase}_of_one_{number}", *more, way, num_devices=2)
        assert run.wait() == [0] * number, run.text()
    assert_same(*(metrics_of(folder, f"{phase}_of_one_{n}") for n in (2, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rollout.devices=2", "rollout.processes=1"])
def test_two_processes_that_sample_in_turn_elsewhere_are_two_that_do_not(folder, way):
    ways = {way: ("mesh={data: 2}", way), "here": ("mesh={data: 4}",)}
    for name, options in ways.items():
        run = Run(folder, 2, "grpo", f"name={name}", *options)
        assert run.wait() == [0, 0], run.text()
    there, here = metrics_of(folder, way), metrics_of(folder, "here")
    assert stale(folder, way) == [0] * 6
    for line in there:
        line.pop("rollout/staleness/max", None), line.pop("rollout/staleness/mean", None)
    assert_same(there, here)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("killed", "options"), [(0, AHEAD), (0, FAR[2]), (1, FAR[2])])
def test_two_processes_that_sample_ahead_stop_and_go_on(folder, killed, options):
    """Together, by SIGTERM to one of them while there is sampling; then one is killed, which ends
    the other; then one process goes on to the end."""
    steps, name = "loop.steps=30", f"parts_{killed}_{options[-1]}"
    whole = Run(folder, 1, "grpo", f"name=whole_{name}", *AHEAD, steps)
    assert whole.wait() == [0], whole.text()
    metrics = folder / "runs" / name / "metrics.jsonl"
    run = Run(folder, 2, "grpo", f"name={name}", *options, steps)
    run.wait_for_step(metrics, 5)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [TERMINATED, TERMINATED], run.text()
    run = Run(folder, 2, "grpo", f"name={name}", *options, steps)
    run.wait_for_step(metrics, 15)
    run.processes[killed].kill()
    assert all(run.wait(60))
    assert "resumed from step" in run.logs[0].read_text()
    run = Run(folder, 1, "grpo", f"name={name}", *AHEAD, steps)
    assert run.wait() == [0], run.text()
    assert "resumed from step" in run.logs[0].read_text()
    assert_same(metrics_of(folder, name), metrics_of(folder, f"whole_{name}"))
