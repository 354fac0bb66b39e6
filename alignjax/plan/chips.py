"""A chip's name -> what it can do: the figures that its maker publishes.

Compute, HBM and the links between chips: the pages of Google's Cloud TPU documentation for v4, v5e,
v5p, v6e and TPU7x ("peak compute per chip (bf16)", "HBM capacity and bandwidth", "bidirectional
inter-chip interconnect bandwidth per chip", "data center network bandwidth"), of v4's links
arXiv:2304.01433 sec. 2 (six, of 50 GB/s in each direction). The network of v4 has no published
figure for a chip; that of v5p stands in its place.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2.0**30


class Chip(NamedTuple):
    """What one device of JAX has. A TPU7x is two devices; of v4 and v5p one is a whole chip (v4:
    with `chip_config_name="megacore"`)."""

    name: str
    bf16_flops: float
    """Floating-point operations per second: of products of bfloat16, summed in float32."""
    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes per second."""
    ici_bandwidth: float
    """Bytes per second of one link to a neighbour, in one direction."""
    dcn_bandwidth: float
    """Bytes per second of the network between slices, in one direction."""
    ring: int = 0
    """An axis of the torus is closed to a ring where a slice has a multiple of so many places along
    it; 0: there is no torus, each device has one link."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1.2e12, 300e9 / 6, 50e9 / 8, ring=4),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 400e9 / 8, 25e9 / 8, ring=16),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 1200e9 / 12, 50e9 / 8, ring=4),
        Chip("v6e", 918e12, 32 * GIB, 1638e9, 800e9 / 8, 100e9 / 8, ring=16),
        Chip("tpu7x", 2307e12 / 2, 96 * GIB, 7380e9 / 2, 1200e9 / 12, 100e9 / 8 / 2, ring=4),
    )
}
"""Bandwidths of links are those of the chip, both directions, over twice its links (4 or 6)."""


def find(name: str) -> Chip:
    """The chip of a name.

    Raises:
      ValueError: with the names that there are.
    """
    if name not in CHIPS:
        raise ValueError(f"{name!r} is no chip that is known: use {', '.join(CHIPS)}")
    return CHIPS[name]
