"""What is tried where a config does not fit, in which order, and what is believed of it."""

import dataclasses

import jax
import pytest

from alignjax.core.config import to_dict
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.phases.sft import SftConfig
from alignjax.plan import search
from alignjax.plan.chips import Chip
from alignjax.plan.measure import Measured
from alignjax.plan.phases import PLANNED
from alignjax.plan.shapes import Shapes
from alignjax.sharding import make_mesh

MODEL = {"init": {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 4}}


def sft(**changes):
    return SftConfig.model_validate({
        "phase": "sft", "name": "x", "tokenizer": "none", "model": MODEL,
        "data": {"train": "x", "text": {"fields": {"completion": "text"}}, "row_len": 32,
                 "rows": 16},
        **changes,
    })  # fmt: skip


def grpo(**changes):
    return GrpoConfig.model_validate({
        "phase": "grpo", "name": "x", "tokenizer": "none", "model": MODEL,
        "data": {"train": "x", "text": {"fields": {"prompt": "prompt"}}},
        "rollout": {"num_prompts": 16, "group_size": 4},
        "rewards": {"functions": {"a": {"function": "verify.exact"}}},
        **changes,
    })  # fmt: skip


def test_an_update_stays_the_same():
    found = [*search.candidates(to_dict(sft()))]
    assert found[0] == {"model.remat": True}
    assert found[1] == {"model.remat": True, "data.micro_batches": 2, "data.rows": 8}
    for change in found:
        changed = search.with_changes(sft(), change)
        assert changed.data.rows * changed.data.micro_batches == 16
        assert changed.data.row_len == 32
    meshes = [search.with_changes(sft(), change).mesh for change in found]
    assert [mesh.tensor for mesh in meshes] == sorted(mesh.tensor for mesh in meshes)
    assert meshes[-1].fsdp == -1 and meshes[-1].tensor == 8


def test_slices_lie_along_data():
    found = [*search.candidates(to_dict(sft()), num_slices=2)]
    assert {change["mesh.data"] for change in found if "mesh.data" in change} == {2}


def test_what_is_on_is_not_tried():
    config = sft(model={**MODEL, "remat": True}, mesh={"data": 1, "fsdp": -1})
    found = [*search.candidates(to_dict(config))]
    assert all("model.remat" not in change for change in found)
    assert found[-1]["mesh.tensor"] == 8 and all(change for change in found)
    assert sum("mesh.fsdp" in change for change in found) == 0  # It is -1 already.


def test_the_sampler_takes_fewer_rows_at_once():
    found = [*search.candidates(to_dict(grpo()))]
    assert [c["rollout.max_rows"] for c in found if "rollout.max_rows" in c][:3] == [32, 16, 8]


@pytest.fixture
def compiled(monkeypatch):
    """Programs whose need is a function of the config's words; nothing is compiled."""
    seen = []

    def measure(program, mesh, chip):
        seen.append((program.name, dict(mesh.shape)))
        needed = 900.0 / mesh.shape["fsdp"]
        return Measured(program.name, 1.0, 0.0, 0.0, 0.0, needed, memory=object())

    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "_at_least", lambda program: 0)
    return seen


def chip(size):
    return Chip("toy", 1e12, size / search.USABLE, 1e11, 1e9, 1e8)


def run(config, size, **options):
    arguments = config, jax.devices(), Shapes(), chip(size), {"train step"}
    return search.search(*arguments, lambda text: None, **options)


def test_the_first_that_fits(compiled):
    found = run(sft(), 200.0)
    assert found.change == {"mesh.data": 1, "mesh.fsdp": -1}
    assert found.words == "mesh.data=1 mesh.fsdp=-1"
    assert found.needed_bytes == 900 / 8
    # Nothing that passed is compiled, and what does not divide over the devices is left out.
    assert {name for name, _ in compiled} == {"train step"}
    assert found.num_compiled == len(compiled) == 3  # remat; 2 micro-batches of 8 rows; fsdp 8


def test_it_ends(compiled):
    found = run(sft(), 10.0, most=4)
    assert found.change is None and found.num_compiled == len(compiled) == 4


def test_what_cannot_fit_is_not_compiled(monkeypatch, compiled):
    monkeypatch.setattr(search, "_at_least", lambda program: 10**9)
    assert run(sft(), 200.0).num_compiled == 0


def test_at_least_what_lies_there():
    (program,) = PLANNED["sft"](sft(), make_mesh(sft().mesh), Shapes()).all
    whole = search._at_least(program)
    assert whole == sum(
        4 * leaf.size for tree in program.resident.values()
        for leaf in map(_Sized, jax.tree.leaves(tree))
    )  # fmt: skip
    empty = dataclasses.replace(program, resident={})
    assert search._at_least(empty) == 0


class _Sized:
    """On a mesh of data alone each device holds all of an array."""

    def __init__(self, x):
        self.size = 1
        for size in x.shape:
            self.size *= size
