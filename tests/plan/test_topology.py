"""Names of topologies, and what is said of those that there are not."""

import pytest

from alignjax.core.errors import UserError
from alignjax.plan import topology
from alignjax.plan.topology import Topology, devices, prepare


@pytest.mark.parametrize(
    ("text", "slices", "expected"),
    [
        ("v5e:16x16", None, Topology("v5e", (16, 16))),
        ("v5p:8x8x16", 1, Topology("v5p", (8, 8, 16))),
        ("2x v5e:16x16", None, Topology("v5e", (16, 16), 2)),
        ("v6e:8x8", 4, Topology("v6e", (8, 8), 4)),
        ("local", None, Topology("local")),
        ("local:8", None, Topology("local", (8,))),
    ],
)
def test_a_name(text, slices, expected):
    found = Topology.parse(text, slices)
    assert found == expected
    assert Topology.parse(str(found)) == found


def test_chips():
    assert Topology.parse("2x v5e:16x16").num_chips == 512
    assert Topology.parse("v5p:8x8x16").num_chips == 1024
    assert Topology.parse("local").num_chips is None


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5e", None, "expected CHIP:SHAPE, such as v5e:16x16"),
        ("v5e:16", None, "expected CHIP:SHAPE"),
        ("h100:8x8", None, "chip 'h100' is none of v4, v5e"),
        ("2x v5e:4x4", 4, "says 2 slices, --slices 4"),
        ("v5e:0x4", None, "0 is no number of devices"),
        ("local:0", None, "0 is no number of devices"),
        ("local:8", 2, "the devices of this machine are one slice"),
    ],
)
def test_what_is_no_name(text, slices, message):
    with pytest.raises(UserError, match=message):
        Topology.parse(text, slices)


def test_without_the_compiler_for_tpus(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    environment = {}
    with pytest.raises(UserError, match=r"is not installed: pip install 'alignjax\[plan\]'"):
        prepare(Topology.parse("v5e:4x4"), environment)
    assert environment == {}


def test_what_the_compiler_for_tpus_reads(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: object())
    environment = {"TPU_WORKER_HOSTNAMES": "mine"}
    prepare(Topology.parse("v5e:4x4"), environment)
    assert environment["JAX_PLATFORMS"] == "cpu" and environment["TPU_SKIP_MDS_QUERY"] == "1"
    assert environment["TPU_WORKER_HOSTNAMES"] == "mine"


def test_local_devices():
    assert len(devices(Topology.parse("local"))) == 8
    assert len(devices(Topology.parse("local:4"))) == 4
    with pytest.raises(UserError, match=r"local:9: this machine has 8 device\(s\)"):
        devices(Topology.parse("local:9"))
