"""Devices that sample while others train: which weights sampled what, and what they weigh."""

import math
import threading
import time
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.phases import rollout_config
from tests.phases import rl
from tests.phases.rl import FakeEngine, assert_equal, config, iterations, make, write_world

ONE_AHEAD = {"devices": 1, "max_staleness": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def staleness(seen):
    return [metrics["rollout/staleness/max"] for metrics, *_ in seen]


def versions(seen):
    found = [
        {v for b in batches for v in np.unique(b["versions"][b["mask"]])} for _, batches, _ in seen
    ]
    for _, batches, _ in seen:
        assert all(
            (b["versions"][~b["mask"] & (b["segment_ids"] > 0)] == -1).all() for b in batches
        )
    assert all(len(one) == 1 for one in found)
    return [int(one.pop()) for one in found]


@pytest.fixture(scope="module")
def in_turn(world):
    """Four iterations on one device, with made-up samples."""
    with pytest.MonkeyPatch.context() as patch:
        FakeEngine().put_in(patch)
        return iterations(make(patch, world, num_devices=1), 4)


def test_in_turn_on_devices_of_its_own_is_the_same_bit_for_bit(world, monkeypatch, in_turn):
    engine = FakeEngine().put_in(monkeypatch)
    phase = make(monkeypatch, world, rollout={"devices": 1})
    state, seen = iterations(phase, 4)
    assert all(devices == {jax.devices()[-1].id} for devices in engine.devices)
    assert state.behaviour == () and staleness(seen) == [0.0] * 4 and versions(seen) == [0, 1, 2, 3]
    for _, batches, _ in seen:
        for batch in batches:
            del batch["versions"]
    for metrics, *_ in seen:
        del metrics["rollout/staleness/max"], metrics["rollout/staleness/mean"]
    assert_equal(
        (state.params, state.opt_state, seen), (in_turn[0].params, in_turn[0].opt_state, in_turn[1])
    )
    phase.close()


@pytest.mark.parametrize("phase", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_samples_are_of_the_recorded_weights_and_a_run_goes_on_bit_for_bit(
    world, monkeypatch, phase
):
    """The weights of two iterations before are sampled from again: after a restart, too."""
    FakeEngine().put_in(monkeypatch)
    options = {"rollout": {"devices": 1, "max_staleness": 2}, "algorithm": rl.WEIGHED}
    first = make(monkeypatch, world, phase, **options)
    known, saved = [], []

    def note(state, records):
        known.append(jax.device_get(state.params))
        saved.append((jax.device_get(state), records.get_state()))

    state, seen = iterations(first, 5, before=note)
    state = jax.device_get(state)
    first.close()
    assert staleness(seen) == [0.0, 1.0, 2.0, 2.0, 2.0] and versions(seen) == [0, 0, 0, 1, 2]

    again = make(monkeypatch, world, phase, **options)
    start, records = again.init(jax.random.PRNGKey(0)), again.records()
    assert len(start.behaviour) == 2
    host, position = saved[3]
    of = lambda state: state["policy"] if phase == "ppo" else state  # noqa: E731
    assert_equal(host.behaviour, (of(known[1]), of(known[2])))
    records.set_state(position)
    restored = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), host, start)
    end, rest = iterations(again, 2, state=restored, records=records)
    assert_equal((end, rest), (state, seen[3:]))
    again.close()


def test_the_weights_of_importance_are_those_of_the_recorded_versions(world, monkeypatch):
    """Of the real sampler: computed anew from the weights of each version, in float64."""
    phase = make(monkeypatch, world, rollout=ONE_AHEAD, algorithm=rl.WEIGHED)
    known = []
    _, seen = iterations(
        phase, 4, before=lambda state, _: known.append(jax.device_get(state.params))
    )
    phase.close()
    assert versions(seen) == [0, 0, 1, 2]
    heavy = []
    for step, (_, (batch,), (update,)) in enumerate(seen):
        mask = batch["mask"]
        (version,) = np.unique(batch["versions"][mask])
        sampled, trained = (np.float64(phase._logps(known[v], batch)) for v in (version, step))
        np.testing.assert_allclose(batch["sampler_logps"][mask], sampled[mask], atol=1e-5)
        np.testing.assert_allclose(batch["old_logps"][mask], trained[mask], atol=1e-5)
        weights = np.minimum(np.exp(trained - sampled), rl.WEIGHED["importance_cap"])
        heavy.append(float((weights == rl.WEIGHED["importance_cap"])[mask].mean()))
        # At the first update the ratio is 1: the loss of a token is minus its weighted advantage.
        each = []
        for row in np.ndindex(mask.shape[:2]):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                on = mask[row] & (batch["segment_ids"][row] == segment)
                each.append((-weights[row][on] * batch["advantages"][row][on]).mean())
        assert len(each) == 16
        assert float(update["loss"]) == pytest.approx(np.mean(each), abs=1e-5)
        assert float(update["sampling/truncated_frac"]) == pytest.approx(heavy[-1], abs=1e-3)
        other = [v for v in range(len(known)) if v != version]
        for v in other:
            off = np.abs(np.asarray(phase._logps(known[v], batch)) - batch["sampler_logps"])[mask]
            assert off.max() > 1e-3, "another version would not pass for it"
    assert max(heavy) > 0.05 and heavy[0] == 0 and abs(float(seen[3][2][0]["loss"])) > 1e-4


def test_evaluations_wait_for_the_sampler_and_sample_the_weights_they_are_given(world, monkeypatch):
    FakeEngine().put_in(monkeypatch)
    found = []
    for rollout in (ONE_AHEAD, {}):
        algorithm = rl.WEIGHED if rollout else {}
        phase = make(
            monkeypatch,
            world,
            num_devices=2 if rollout else 1,
            rollout=rollout,
            algorithm=algorithm,
        )
        state = phase.init(jax.random.PRNGKey(0))
        if rollout:
            phase.collect(state, phase.records())  # Something is in flight.
        found.append(phase.evaluate(state).metrics)
        phase.close()
    assert found[0] == found[1] and "eval/sampled/reward" in found[0]


def test_what_fails_while_it_is_sampled_ahead_is_told_in_its_turn(world, monkeypatch):
    engine = FakeEngine()
    calls = []

    def third_fails(*args):
        calls.append(1)
        if len(calls) == 3:
            raise UserError("no luck")
        return engine(*args)

    monkeypatch.setattr(rl.rollouts, "make_generate", lambda model, **_: third_fails)
    phase = make(monkeypatch, world, rollout=ONE_AHEAD, algorithm=rl.WEIGHED)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, _ = iterations(phase, 2, state=state, records=records)
    position = records.get_state()
    with pytest.raises(UserError, match="no luck"):
        phase.collect(state, records)
    assert records.get_state() == position and int(state.step) == 2, "it can be saved"
    _, seen = iterations(phase, 1, state=state, records=records)
    assert versions(seen) == [1], "and goes on"
    phase.close()


def test_nothing_is_sampled_that_nobody_will_train_on(world, monkeypatch):
    engine = FakeEngine().put_in(monkeypatch)
    phase = make(
        monkeypatch, world, rollout=ONE_AHEAD, algorithm=rl.WEIGHED, loop={"steps": 3}
    )  # fmt: skip
    iterations(phase, 3)
    phase.close()
    assert len(engine.devices) == 3


def test_a_run_that_ends_does_not_wait_for_what_is_in_flight(world, monkeypatch):
    """Which would be a minute here."""
    calls, begun = [], threading.Event()

    def third_is_endless(params, *args):
        calls.append(1)
        if len(calls) == 3:
            begun.set()
            for _ in range(600):
                time.sleep(0.1)
                jax.block_until_ready(jax.tree.map(lambda x: x + 0, params))
        return engine(params, *args)

    engine = FakeEngine()
    monkeypatch.setattr(rl.rollouts, "make_generate", lambda model, **_: third_is_endless)
    phase = make(monkeypatch, world, rollout=ONE_AHEAD, algorithm=rl.WEIGHED)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, _ = phase.collect(state, records)
    state, _ = phase.collect(state._replace(step=state.step + 1), records)
    assert begun.wait(60)
    start = time.monotonic()
    phase.close()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"max_staleness": 1}}, "max_staleness=1: .* give devices"),
        ({"rollout": ONE_AHEAD}, r"add algorithm: \{old_logps: trainer, importance_cap: 2.0\}"),
        ({"algorithm": {"importance_cap": 2.0}}, "old_logps='sampler': .* set old_logps: trainer"),
        ({"rollout": {"devices": 1}, "deterministic": True}, "leave out rollout.mesh, r"),
        ({"rollout": {"processes": 1}, "deterministic": True}, "and rollout.processes"),
        ({"rollout": {"processes": 1, "devices": 1}}, "devices=1 .* processes=1 .* one of them"),
        (
            {"rollout": {"processes": 1, "max_staleness": 2}, "algorithm": rl.WEIGHED},
            "max_staleness=2 with processes=1: .* nothing from more than 1",
        ),
        ({"rollout": {"mesh": {"tensor": 2}}, "deterministic": True}, "leave out rollout.mesh"),
    ],
)
@pytest.mark.parametrize("phase", ["grpo", "ppo"])
def test_configs_that_make_no_sense_are_refused(world, phase, changes, message):
    with pytest.raises(ValidationError, match=message):
        config(world, phase, **changes)


@pytest.mark.parametrize(
    ("num", "total", "message"),
    [
        (8, 8, r"rollout.devices=8 of 8 device\(s\) leaves 0 to train: .* does: 1, 2, 4, 6, 7$"),
        (9, 8, "leaves 0 to train"),
        (3, 8, "leaves 5 to train: expected a number that divides the other"),
        (1, 1, "none: it takes 2 devices at least"),
    ],
)
def test_devices_that_do_not_divide_are_explained(world, num, total, message):
    with pytest.raises(UserError, match=message):
        config(world, rollout={"devices": num}).training_mesh(jax.devices()[:total])


@dataclass(frozen=True)
class OfHost:
    """As much of a device as says whose it is."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("processes", "sizes", "message"),
    [
        (1, [4], r"processes=1 of 1 process\(es\) leaves 0 of 4 .* 2 processes at least"),
        (2, [4, 4], "leaves 0 of 8"),
        (2, [4, 4, 4, 4, 4], "leaves 12 of 20 .* a number that divides"),
    ],
)
def test_processes_that_do_not_divide_are_explained(world, processes, sizes, message):
    devices = [OfHost(i, process) for process, size in enumerate(sizes) for i in range(size)]
    with pytest.raises(UserError, match=message):
        config(world, rollout={"processes": processes}).rollout.training_devices(devices)


def test_the_last_hosts_sample_for_the_others(world):
    devices = [OfHost(i, i // 4) for i in range(16)]
    for processes, num_left in ((1, 12), (2, 8), (3, 4)):
        limits = config(world, rollout={"processes": processes}).rollout
        assert limits.training_devices(devices) == devices[:num_left]


def test_each_host_has_as_many_devices_that_sample(world):
    devices = [OfHost(i, i // 4) for i in range(8)]
    rollout = config(world, rollout={"devices": 4}).rollout
    training = rollout.training_devices(devices)
    assert [device.id for device in training] == [0, 1, 4, 5]
    sampling = [device for device in devices if device not in training]
    # Whatever the order in which they train, each gets its weights from its own host.
    beside = rollout_config._beside([training[i] for i in (2, 0, 3, 1)], sampling)
    assert [device.process_index for device in beside] == [1, 0, 1, 0]
    apart = [training[i] for i in (0, 1)], [devices[6], devices[7]]
    with pytest.raises(UserError, match="weights would go from process to process"):
        rollout_config._beside(*apart)
    with pytest.raises(UserError, match=r"8 device\(s\) of 2 processes .* does: 2, 4, 6$"):
        config(world, rollout={"devices": 3}).rollout.training_devices(devices)


def test_a_mesh_that_does_not_fit_is_named(world, monkeypatch):
    with pytest.raises(UserError, match=r"^rollout.mesh data=-1, tensor=3 does not fit 2 device"):
        make(monkeypatch, world, rollout={"mesh": {"tensor": 3}})
    with pytest.raises(UserError, match=r"^rollout.mesh data=-1, tensor=8 does not fit 4 device"):
        make(monkeypatch, world, num_devices=8, rollout={"devices": 4, "mesh": {"tensor": 8}})
    with pytest.raises(UserError, match=r"^mesh data=-1, fsdp=8 does not fit 4 device"):
        make(monkeypatch, world, num_devices=8, mesh={"fsdp": 8}, rollout={"devices": 4})
    assert math.prod(config(world).training_mesh().shape.values()) == 8
