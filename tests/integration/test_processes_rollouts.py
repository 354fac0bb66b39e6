"""Several real processes sample in another layout of the weights than they train in."""

import pytest

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


@pytest.mark.slow
def test_devices_that_only_sample_are_of_one_process(folder):
    run = Run(folder, 2, "grpo", "name=apart", "rollout.devices=2", "mesh={data: 2}")
    assert all(run.wait())
    assert "rollout.devices=2: devices that only sample are of a single process" in run.text()
