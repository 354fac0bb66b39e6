"""Times of costs by hand, and the published figures of chips."""

import pytest

from alignjax.plan.chips import CHIPS, Chip, find
from alignjax.plan.hlo import Collective, Costs
from alignjax.plan.roofline import estimate, num_links

CHIP = Chip("toy", 1e12, 1e9, 1e11, 1e9, 1e8, ring=4)


def time_of(*collectives, flops=0.0, size=0.0):
    return estimate(Costs(flops, size, list(collectives)), CHIP)


def test_the_slowest_resource_bounds():
    assert time_of(flops=2e12, size=1e11) == (2.0, 1.0, 0.0, 0.0, "compute", 2.0)
    assert time_of(flops=1e12, size=3e11)[-2:] == ("HBM", 3.0)
    assert time_of(Collective("all-gather", 8e9, 4), flops=1e12)[-2:] == ("ICI", 6.0)


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all-gather", 0.75),
        ("reduce-scatter", 0.75),
        ("all-reduce", 1.5),
        ("all-to-all", 0.75),
        ("collective-permute", 1.0),
    ],
)
def test_rings_of_four(kind, seconds):
    """1 GB over links of 1 GB/s, once and three times."""
    assert time_of(Collective(kind, 1e9, 4)).ici_s == pytest.approx(seconds)
    assert time_of(Collective(kind, 1e9, 4, times=3)).ici_s == pytest.approx(3 * seconds)


def test_alone_in_its_group_a_device_moves_nothing():
    assert time_of(Collective("all-reduce", 1e9, 1)).seconds == 0


def test_between_slices():
    """8 devices in 2 slices: 4 of each sum 1 GB, and send a quarter of it over the network."""
    crossing = Collective("all-reduce", 1e9, 8, crosses_slices=True, num_slices=2)
    time = time_of(crossing)
    assert time.ici_s == pytest.approx(1.5)
    assert time.dcn_s == pytest.approx(2 * 1e9 / 2 / 4 / 1e8) and time.bound == "DCN"
    alone = Collective("all-reduce", 1e9, 2, crosses_slices=True, num_slices=2)
    assert time_of(alone)[2:4] == (0.0, pytest.approx(2 * 1e9 / 2 / 1e8))
    sent = Collective("collective-permute", 1e9, 2, crosses_slices=True, num_slices=2)
    assert time_of(sent)[2:4] == (0.0, pytest.approx(10.0))


@pytest.mark.parametrize(
    ("spans", "links"),
    [((), 1), (((4, 4),), 2), (((4, 16),), 1), (((8, 8), (2, 2)), 3), (((2, 6),), 1)],
)
def test_links_along_the_axes_of_a_torus(spans, links):
    gather = Collective("all-gather", 1e9, 4, spans=spans)
    assert num_links(gather, CHIP) == links
    assert time_of(gather).ici_s == pytest.approx(0.75 / links)


def test_chips_have_the_published_figures():
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e", "tpu7x"}
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    assert (v5e.bf16_flops, v5e.hbm_bytes, v5e.hbm_bandwidth) == (197e12, 16 * 2**30, 819e9)
    assert 256 * v5e.dcn_bandwidth * 8 == 6.4e12  # Of a pod.
    assert 4 * 2 * v5e.ici_bandwidth == 400e9 and 6 * 2 * v5p.ici_bandwidth == 1200e9
    with pytest.raises(ValueError, match="'v9' is no chip that is known: use v4, v5e"):
        find("v9")
