"""Devices that only sample: what lies there is what runs there, and is counted there alone."""

import jax
import pytest

from alignjax.core.errors import UserError
from alignjax.models import lora
from alignjax.phases.common import Policy
from alignjax.phases.rollout_config import RolloutConfig
from alignjax.phases.rollout_devices import RolloutDevices, Weights
from alignjax.plan import memory
from alignjax.plan.phases import programs_of
from alignjax.plan.programs import OPTIMIZER, PARAMS
from alignjax.plan.shapes import Shapes
from tests.plan.small import config_of

STEP, LAY = "train step", "lay out the weights"


def config_with(world, devices, staleness=0, mesh=None, processes=0, **changes):
    rollout = {
        "num_prompts": 12, "group_size": 4, "max_prompt_tokens": 20, "max_tokens": 40,
        "devices": devices, "processes": processes, "max_staleness": staleness, "mesh": mesh,
    }  # fmt: skip
    algorithm = {"old_logps": "trainer", "importance_cap": 2.0}
    return config_of(
        world, "grpo", rollout=rollout, algorithm=algorithm, mesh={"data": 1, "fsdp": -1}, **changes
    )


def planned(config):
    mesh, found = programs_of(config, jax.devices(), Shapes())
    return mesh, found, {program.name: program for program in found.all}


@pytest.mark.parametrize(
    ("devices", "layout", "is_lora"),
    [(4, {"tensor": 4}, False), (2, None, True), (6, {"data": 3, "tensor": 2}, False)],
    ids=["as many", "fewer, adapters", "more"],
)
def test_weights_lie_as_planned(world, devices, layout, is_lora):
    """One iteration ahead: as they are sent, for each iteration in flight; and as they sample."""
    changes = {"model__lora": {"rank": 2}} if is_lora else {}
    config = config_with(world, devices, 1, layout, **changes)
    mesh, _, programs = planned(config)
    policy = Policy(config, config.training_mesh())
    params = policy.init(jax.random.PRNGKey(0))
    real = Weights(policy.model, policy.frozen, RolloutDevices(config.rollout, mesh))
    sent = real.push(params).result()
    whole, resident = real(sent), programs["prefill"].resident
    if devices == 6:
        moved, kept = resident["moved weights"], resident["sent weights"]
        assert len(kept) == 2
    else:
        moved, other = resident["moved weights"]
        kept = [lora.split(moved)[0] if is_lora else moved, other]
        assert "sent weights" not in resident
    for plan, array in (*zip(kept, (sent, sent), strict=True), (moved, whole)):
        assert jax.tree.structure(plan) == jax.tree.structure(array)
        for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(array), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    given = jax.tree.leaves(programs["prefill"].lower().args_info[0][0])
    assert [x.shape for x in given] == [x.shape for x in jax.tree.leaves(moved)]
    # The last step to it on the devices leaves parts of the size that goes, or computes.
    made = jax.tree.leaves(programs[LAY].lower().compile().output_shardings)
    wanted = jax.tree.leaves(whole if devices == 6 else sent)
    parts = [x.sharding.shard_shape(x.shape) for x in wanted]
    assert [one.shard_shape(x.shape) for one, x in zip(made, wanted, strict=True)] == parts


def test_each_kind_of_device_has_what_is_its_own(world):
    mesh, found, programs = planned(config_with(world, 4))
    (apart,) = {program.apart for program in found.all if program.apart is not None}
    assert {*apart.devices.flat} == {*jax.devices()[4:]}
    assert {*mesh.devices.flat} == {*jax.devices()[:4]}
    training = {name for name, program in programs.items() if program.apart is None}
    assert training == {LAY, "old log-probs", "reference scoring", STEP}
    sampler = programs["reward learned"].resident
    assert {"moved weights", "reward learned"} == {*sampler}
    assert "reward learned" not in programs[STEP].resident
    assert {PARAMS, OPTIMIZER} <= {*programs[STEP].resident}
    # In turn there is one copy of the weights, whole on each: four times what fsdp leaves there.
    (moved,) = sampler["moved weights"]
    sizes = [memory.tree_bytes(tree) for tree in (moved, programs[STEP].resident[PARAMS])]
    assert 3.5 < sizes[0] / sizes[1] <= 4
    assert not found.is_ahead and "both, one after the other" in found.notes[-1]
    assert f"After it {sizes[0] / 1e9:.3g} GB of weights go to each" in found.notes[-1]
    _, ahead, later = planned(config_with(world, 4, 2))
    assert ahead.is_ahead and "the longer of both" in ahead.notes[-1]
    assert memory.tree_bytes(later["prefill"].resident["moved weights"]) == 3 * sizes[0]


def test_processes_that_train_keep_what_samples_elsewhere(world, monkeypatch):
    half = staticmethod(lambda devices: devices[:4])
    monkeypatch.setattr(RolloutConfig, "training_devices", half)
    _, _, near = planned(config_with(world, 4, 1))
    mesh, _, far = planned(config_with(world, 0, 1, processes=1))
    assert {*mesh.devices.flat} == {*jax.devices()[:4]}
    (kept,) = far[STEP].resident["kept weights"]
    assert memory.tree_bytes(kept) == memory.tree_bytes(far[STEP].resident[PARAMS])
    assert "kept weights" not in near[STEP].resident
    assert far["prefill"].resident.keys() == near["prefill"].resident.keys()


def test_devices_that_do_not_fit(world):
    with pytest.raises(UserError, match=r"rollout\.devices=3 of 8 device"):
        planned(config_with(world, 3))
    with pytest.raises(UserError, match=r"rollout\.mesh .* does not fit 4 device"):
        planned(config_with(world, 4, mesh={"tensor": 3}))
