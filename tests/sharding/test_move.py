"""Arrays move between layouts and devices, part by part, and never through the host."""

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.sharding import MeshConfig, make_mesh, move, moved, sent
from alignjax.sharding.move import _into

SPECS = [("fsdp", "tensor"), ("tensor", "fsdp"), (None, "tensor"), (None, None)]


def mesh_of(first, last, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[first:last])


def refuse(self):
    raise AssertionError("fetched to the host")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((0, 8, {"fsdp": 8}), (0, 8, {"data": 2, "tensor": 4})),
        ((0, 4, {"fsdp": 4}), (4, 8, {"data": 2, "tensor": 2})),
        ((0, 6, {"data": 3, "fsdp": 2}), (6, 8, {"tensor": 2})),
        ((0, 2, {"fsdp": 2}), (2, 8, {"data": 3, "tensor": 2})),
    ],
    ids=["same", "equal", "fewer", "more"],
)
@pytest.mark.parametrize("is_near", [True, False], ids=["near", "far"])
def test_the_content_is_the_same_wherever_it_goes(monkeypatch, source, target, is_near):
    """Within a process, and as if each device were of another one."""
    monkeypatch.setattr(move, "_is_near", lambda a, b: is_near)
    content = np.arange(56 * 24, dtype=np.float32).reshape(56, 24)
    a, b = mesh_of(*source[:2], **source[2]), mesh_of(*target[:2], **target[2])
    arrays = {
        i: jax.device_put(content, NamedSharding(a, PartitionSpec(*spec)))
        for i, spec in enumerate(SPECS)
    }
    targets = {i: NamedSharding(b, PartitionSpec(*spec)) for i, spec in enumerate(SPECS)}
    monkeypatch.setattr(ArrayImpl, "_value", property(refuse))
    found = moved(arrays, targets)
    jax.block_until_ready(found)
    monkeypatch.undo()
    for i, array in found.items():
        assert array.sharding == targets[i]
        np.testing.assert_array_equal(array, content)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, content[shard.index])


@pytest.mark.parametrize(
    ("first", "last"), [(4, 6), (4, 8), (2, 8)], ids=["fewer", "equal", "more"]
)
def test_what_is_sent_is_there_and_computes_nothing_there(monkeypatch, first, last):
    content = np.arange(56 * 24, dtype=np.float32).reshape(56, 24)
    here = mesh_of(0, min(4, first), fsdp=2, data=-1)
    there = mesh_of(first, last, tensor=2, data=-1)
    array = jax.device_put(content, NamedSharding(here, PartitionSpec("fsdp", "tensor")))
    target = NamedSharding(there, PartitionSpec("fsdp", "tensor"))
    programs, into = [], move._into

    def note(sharding):
        programs.append(sharding.device_set)
        return into(sharding)

    monkeypatch.setattr(move, "_into", note)
    on_the_way = sent(array, target)
    assert all(devices.isdisjoint(target.device_set) for devices in programs)
    assert on_the_way.sharding.device_set == target.device_set
    np.testing.assert_array_equal(on_the_way, content)
    arrived = moved(on_the_way, target)
    assert arrived.sharding == target
    np.testing.assert_array_equal(arrived, content)


def test_what_lies_as_it_should_is_not_copied():
    mesh = mesh_of(0, 4, fsdp=4)
    array = jax.device_put(np.ones((8, 8)), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    same = NamedSharding(mesh_of(0, 4, fsdp=4), PartitionSpec("fsdp"))
    found = moved(array, same)
    pointers = [
        [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
        for x in (array, found)
    ]
    assert pointers[0] == pointers[1]


def test_no_device_holds_the_whole_array_on_the_way():
    """Into a layout that repeats its parts, too, where the compiler left alone would gather it."""
    source = NamedSharding(mesh_of(0, 8, fsdp=8), PartitionSpec(None, "fsdp", "tensor"))
    target = NamedSharding(mesh_of(0, 8, data=2, tensor=4), PartitionSpec(None, "fsdp", "tensor"))
    shape = jax.ShapeDtypeStruct((2, 64, 32), np.float32, sharding=source)
    text = _into(target).lower(shape).compile().as_text()
    assert "f32[2,64,8]" in text and "f32[2,64,32]" not in text and "f32[2,64,16]" not in text


def test_other_devices_are_other_ones_altogether_and_their_numbers_go_together():
    array = jax.device_put(np.ones(24), NamedSharding(mesh_of(0, 4, data=4), PartitionSpec()))
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3\] to \[2, 3, 4, 5\]: expected the same"):
        moved(array, NamedSharding(mesh_of(2, 6, data=4), PartitionSpec()))
    with pytest.raises(ValueError, match="from 4 devices to 3: expected one number to be"):
        moved(array, NamedSharding(mesh_of(5, 8, data=3), PartitionSpec()))
