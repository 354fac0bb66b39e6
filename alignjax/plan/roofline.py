"""Costs of a program and a chip -> the time that it takes at least, and what bounds it."""

from __future__ import annotations

from typing import NamedTuple

from alignjax.plan.chips import Chip
from alignjax.plan.hlo import Collective, Costs

_PASSES = {"all-reduce": 2}
"""Times that an array goes round: an all-reduce is a reduce-scatter and an all-gather."""


class Time(NamedTuple):
    """Seconds of one call on one device, if nothing else held it up."""

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    bound: str
    """What takes longest: "compute", "HBM", "ICI" or "DCN"."""
    seconds: float
    """The longest of them: as if all went on at the same time, each at its peak."""


def estimate(costs: Costs, chip: Chip) -> Time:
    """A roofline: no program is faster than its slowest resource at that resource's peak.

    No efficiencies are assumed, so that it is a bound and not a forecast: products in float32, or
    too small for the matrix unit, work outside of products, latencies and whatever is not
    overlapped make a step slower.

    Collectives go round a ring: an all-gather and a reduce-scatter of n devices move (n - 1) / n of
    the array over each link, an all-reduce twice as much. A group may use all links along the axes
    of the torus that it lies in: two along an axis that it fills and that is closed to a ring, else
    one. An all-to-all counts as if each device were a neighbour of each other. Of a group in
    several slices, each device sends its own part of the array over the network, after the devices
    of its slice have shared the work.
    """
    times = {
        "compute": costs.flops / chip.bf16_flops,
        "HBM": costs.bytes / chip.hbm_bandwidth,
        "ICI": sum(_ici_s(each, chip) for each in costs.collectives),
        "DCN": sum(_dcn_s(each, chip) for each in costs.collectives),
    }
    bound = max(times, key=lambda name: times[name])
    return Time(times["compute"], times["HBM"], times["ICI"], times["DCN"], bound, times[bound])


def _ici_s(each: Collective, chip: Chip) -> float:
    """Seconds on the links within a slice."""
    members = each.group_size // each.num_slices
    if members < 2 or (each.kind == "collective-permute" and each.crosses_slices):
        return 0.0
    links = 1 if each.kind == "collective-permute" else num_links(each, chip)
    return _moved(each, members) / (links * chip.ici_bandwidth)


def _dcn_s(each: Collective, chip: Chip) -> float:
    """Seconds on the network between slices."""
    if not each.crosses_slices:
        return 0.0
    members = each.group_size // each.num_slices
    if each.kind == "collective-permute":
        members = 1
    return _moved(each, each.num_slices) / max(members, 1) / chip.dcn_bandwidth


def _moved(each: Collective, parts: int) -> float:
    """Bytes that a device sends where `parts` take part, over all times."""
    if each.kind == "collective-permute":
        return each.times * each.bytes
    return each.times * _PASSES.get(each.kind, 1) * each.bytes * (parts - 1) / parts


def num_links(each: Collective, chip: Chip) -> int:
    """Links of a device over which its group can send at once, in one direction."""
    if not chip.ring or not each.spans:
        return 1
    return sum(2 if own == every and every % chip.ring == 0 else 1 for own, every in each.spans)
