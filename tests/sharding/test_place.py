"""Arrays land where they belong, also on the devices of several real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignjax.sharding import MeshConfig, init_sharded, make_mesh, put_batch, shardings
from alignjax.sharding.mesh import BATCH_AXES
from tests.flags import xla_flags

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def init(key):
    return {"a": jax.random.normal(key, (6, 4)), "b": jnp.arange(5.0)}


def test_params_are_born_sharded(mesh):
    axes = {"a": ("mlp", "embed"), "b": ("mlp",)}
    params = init_sharded(init, jax.random.key(0), shardings(axes, mesh))
    assert params["a"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert {shard.data.shape for shard in params["a"].addressable_shards} == {(3, 2)}
    assert params["b"].sharding.is_fully_replicated  # 5 does not divide by 2
    jax.tree.map(np.testing.assert_array_equal, params, init(jax.random.key(0)))
    # Nowhere in the compiled program does a device hold the whole of it.
    target = jax.tree.map(lambda array: array.sharding, params)
    text = jax.jit(init, out_shardings=target).lower(jax.random.key(0)).compile().as_text()
    assert "f32[3,2]" in text
    assert "f32[6,4]" not in text


def test_batch(mesh):
    tokens = np.arange(2 * 8 * 3, dtype=np.int32).reshape(2, 8, 3)
    arrays = {"tokens": tokens, "step": np.int32(7), "scale": np.ones(3, np.float32)}
    batch = put_batch(arrays, mesh, batch_axis=1)
    np.testing.assert_array_equal(batch["tokens"], tokens)
    assert batch["tokens"].sharding.spec == PartitionSpec(None, BATCH_AXES)
    for shard in batch["tokens"].addressable_shards:
        assert shard.data.shape == (2, 2, 3)
        np.testing.assert_array_equal(shard.data, tokens[shard.index])
    assert batch["step"].sharding.is_fully_replicated
    assert int(batch["step"]) == 7
    assert batch["scale"].sharding.is_fully_replicated and batch["scale"].shape == (3,)


def test_tokens_are_split_over_sequence():
    mesh = make_mesh(MeshConfig(data=2, sequence=4))
    tokens = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    batch = put_batch({"tokens": tokens, "odd": np.zeros((4, 6))}, mesh)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(batch["tokens"], tokens)
    assert {shard.data.shape for shard in batch["odd"].addressable_shards} == {(2, 6)}


def test_rows_that_do_not_divide(mesh):
    with pytest.raises(ValueError, match="tokens: 6 rows do not divide over 4 devices"):
        put_batch({"tokens": np.zeros((6, 2))}, mesh)


WORKER = """
import sys, time, jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from alignjax.core.errors import UserError
from concurrent.futures import ThreadPoolExecutor
from jax.sharding import NamedSharding, PartitionSpec
from alignjax.core.processes import any_of, gather, sent_by, together, told, wait_for_all
from alignjax.sharding import MeshConfig, fetch, holders, make_mesh, moved, put_batch
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
all_rows = np.array([[10, 11], [12, 13], [110, 111], [112, 113]], np.int32)
batch = put_batch({"x": all_rows, "seed": np.int32(5)}, mesh)
assert batch["x"].shape == (4, 2), batch["x"].shape
assert len(batch["x"].addressable_shards) == 2
doubled = jax.jit(lambda batch: batch["x"] * 2 + batch["seed"])(batch)
np.testing.assert_array_equal(fetch({"a": [doubled]})["a"][0], all_rows * 2 + 5)
assert any_of(jax.process_index() == 1) and not any_of(False)
def ask(word, seconds):
    for i in range(20):
        time.sleep(seconds)
        text = word * (i + 1 + jax.process_index())
        assert gather(text) == [word * (i + 1), word * (i + 2)]
    wait_for_all(word)
def ask_elsewhere():
    ask("b", 0.02 * jax.process_index())
with ThreadPoolExecutor(1) as thread:
    elsewhere = thread.submit(ask_elsewhere)
    ask("a", 0.02 * (1 - jax.process_index()))
    elsewhere.result()
for i in range(150):  # More than are kept at a time.
    assert sent_by(i % 2, f"{i} of {jax.process_index()}".encode()) == f"{i} of {i % 2}".encode()
assert told(f"by {jax.process_index()}") == "by 0"
of_one = [make_mesh(MeshConfig(data=2), jax.devices()[2 * i : 2 * i + 2]) for i in range(2)]
values = {"x": np.arange(8.0).reshape(4, 2), "none": np.zeros((0, 3)), "n": np.int32(9)}
for first, second in (of_one, of_one[::-1]):
    here = put_batch(values, first)
    assert holders(here) == {first.devices.flat[0].process_index}
    doubled = jax.jit(lambda x: 2 * x)(here["x"])
    seen = fetch({**here, "doubled": doubled, "all": batch["x"]})
    np.testing.assert_array_equal(seen["doubled"], 2 * values["x"])
    np.testing.assert_array_equal(seen["all"], all_rows)
    assert seen["n"] == 9 and seen["n"].dtype == np.int32 and seen["none"].shape == (0, 3)
    there = moved(doubled, NamedSharding(second, PartitionSpec(None, "data")))
    assert holders(there) == {second.devices.flat[0].process_index}
    for shard in there.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * values["x"][shard.index])
    np.testing.assert_array_equal(fetch(there), 2 * values["x"])
with together():
    pass
try:
    with together():
        if jax.process_index() == 1:
            raise UserError("the disk is full")
except UserError as error:
    print("stopped:", error)
"""


def test_two_processes():
    """Each gives all rows, and gets them back; what stops one stops both; two threads ask, each
    process in another order; what one has the other is told, and is sent."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": xla_flags(2), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", WORKER, str(port)]
    workers = [
        subprocess.Popen([*command, str(i)], env=env, text=True, stdout=-1, stderr=-1)
        for i in range(2)
    ]
    try:
        for worker, reason in zip(
            workers, ("another process was", "the disk is full"), strict=True
        ):
            out, err = worker.communicate(timeout=120)
            assert worker.returncode == 0, err
            assert "stopped: " in out and reason in out
    finally:
        for worker in workers:
            worker.kill()
