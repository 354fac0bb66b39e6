"""Figures of a phase by hand, what a compiler says that has no room, and what is printed."""

import dataclasses
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from alignjax.plan.chips import Chip
from alignjax.plan.hlo import Collective, Costs
from alignjax.plan.measure import Measured, PhasePlan, iteration_s, needed_bytes
from alignjax.plan.memory import Memory
from alignjax.plan.programs import Program
from alignjax.plan.report import Plan, show
from alignjax.plan.roofline import estimate
from alignjax.plan.search import Remedy

GIB = 2**30
CHIP = Chip("toy", 1e12, 16 * GIB, 1e11, 1e9, 1e8)


def measured(name, times, gib, flops=1e12, **more):
    costs = Costs(flops, 1e9, [Collective("all-gather", 2e9, 4, times=2)])
    parts = {"parameters": GIB, "activations and temporaries": int((gib - 1) * GIB)}
    return Measured(
        name, times, 1.0, 9.0, 5.0, gib * GIB, Memory(parts, GIB, GIB), costs,
        estimate(costs, CHIP), **more,
    )  # fmt: skip


def phase_of(*programs, seconds=8.0):
    return PhasePlan(
        "sft", "sft", {"fsdp": 4}, [*programs], 0.98 * CHIP.hbm_bytes, seconds, 4000.0, 900, 4,
        ["something is taken for granted"],
    )  # fmt: skip


def printed(phase, **more):
    console = Console(file=io.StringIO(), width=200, highlight=False)
    show(Plan("x.yaml", "toy:2x2", 4, 4, CHIP, [phase], **more), console)
    return console.file.getvalue()


def test_figures_by_hand():
    phase = phase_of(measured("train step", 2, 4.0), measured("evaluation", 0, 5.0))
    assert phase.needed_bytes == 5 * GIB and phase.fits
    assert phase.tokens_per_second == 500
    assert phase.chip_hours == 900 * 8 * 4 / 3600
    (step, _) = phase.as_json()["programs"]
    # An all-gather of 2 GB over 4 devices moves three quarters of it over a link of 1 GB/s, twice.
    assert step["ici_s"] == 3.0 and step["compute_s"] == 1.0 and step["bound"] == "ICI"
    assert step["collectives"] == [
        {"kind": "all-gather", "group_size": 4, "crosses_slices": False, "times": 2, "bytes": 4e9}
    ]


def test_what_is_printed():
    text = printed(phase_of(measured("train step", 2, 4.0, utilisation=0.25)))
    assert "x.yaml on toy:2x2: 4 devices" in text and "mesh fsdp 4" in text
    row = next(line for line in text.splitlines() if line.startswith("train step"))
    assert row.split() == [
        "train", "step", "2", "4.00", "1", "1", "4", "0", "3e+03", "ICI", "10",
    ]  # fmt: skip
    assert "4.00 of 15.68 (98% of 16) GiB: activations and temporaries 3.00, parameters" in text
    assert "at least 8 s: at most 500 tokens/s; 900 iterations at least 8 chip-hours" in text
    assert "utilisation at most 25% (of the model's own FLOPs), bound by ICI" in text
    assert "\n  fits\n" in text and "note: something is taken for granted" in text


def test_devices_of_their_own():
    """In turn an iteration takes the sum, ahead the longer of both kinds."""
    sampler = measured("decode", 4, 6.0, is_apart=True)
    steps = measured("train step", 2, 4.0), sampler, measured("old log-probs", 1, 3.0)
    assert iteration_s(steps, is_ahead=False) == (2 + 4 + 1) * 3.0
    assert iteration_s(steps, is_ahead=True) == 4 * 3.0
    phase = dataclasses.replace(phase_of(*steps), sampling_mesh={"data": 2, "tensor": 2})
    text = printed(phase)
    assert "mesh fsdp 4, and to sample data 2 x tensor 2" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("decode", "train"))]
    assert rows[0][:4] == ["train", "step", "train", "2"] and rows[1][:2] == ["decode", "sample"]
    assert "memory of each device (train) in train step: 4.00 of" in text
    assert "memory of each device (sample) in decode: 6.00 of" in text
    saved = phase.as_json()
    assert saved["sampling_mesh"] == {"data": 2, "tensor": 2}
    assert [one["is_apart"] for one in saved["programs"]] == [False, True, False]
    unknown = Measured("step", 1, 1.0, 9.0, 5.0, 20.0 * GIB)
    assert iteration_s([*steps, unknown], is_ahead=True) is None


def test_what_does_not_fit():
    large = phase_of(measured("train step", 1, 20.0))
    assert not large.fits
    fits = Remedy({"model.remat": True, "data.micro_batches": 2}, 9 * GIB, 3)
    text = printed(large, remedies={"sft": fits})
    assert "does not fit, and this would: model.remat=true data.micro_batches=2 (9.00 GiB)" in text
    text = printed(large, remedies={"sft": Remedy(None, None, 8)})
    assert "nothing that was tried would (8 compilations)" in text
    refused = phase_of(Measured("train step", 1, 1.0, 9.0, 5.0, 20.0 * GIB), seconds=None)
    assert not refused.fits and refused.chip_hours is None
    assert "20.00 of 15.68 (98% of 16) GiB: the compiler found no room" in printed(refused)


@pytest.fixture
def program():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kib = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=one)
    return Program("step", lambda: None, ("params", "batch"), {"params": kib, "other": [kib] * 2})


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (27.5G) exceeds available HBM (15.75G).",
            27.5 * GIB + 3 * 1024,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 512.00M of 256.00M hbm.",
            2**29 + 2 * 1024,
        ),
    ],
)
def test_no_room(program, message, needed):
    assert needed_bytes(message, program) == needed


def test_anything_else_is_raised(program):
    with pytest.raises(RuntimeError, match="INTERNAL: a bug"):
        needed_bytes("INTERNAL: a bug", program)
    with pytest.raises(RuntimeError, match="something new"):
        needed_bytes("RESOURCE_EXHAUSTED: something new", program)


def test_a_program_without_room_is_measured_all_the_same(program, monkeypatch):
    from alignjax.plan import measure

    def refuse():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (2G) exceeds"
        )

    lowered = SimpleNamespace(compile=refuse)
    found = measure.measure(
        Program("step", lambda: lowered, program.roles, program.resident), None, CHIP
    )
    assert found.memory is None and found.time is None
    assert found.needed_bytes == 2 * GIB + 3 * 1024
