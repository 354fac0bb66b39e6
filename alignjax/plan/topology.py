"""`v5e:16x16` -> the devices of such a slice, which need not be there: what is compiled for.

Nothing here imports jax before `prepare` has set what it reads from the environment once.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignjax.core.errors import UserError

if TYPE_CHECKING:
    import jax

EXAMPLES: dict[str, str] = {
    "v4": "v4:2x2x1 to v4:4x4x4", "v5e": "v5e:2x2, 2x4, 4x4 to 16x16",
    "v5p": "v5p:2x2x1 to v5p:8x8x16", "v6e": "v6e:2x2, 2x4, 4x4 to 16x16",
    "tpu7x": "tpu7x:2x2x1 to tpu7x:4x4x4",
}  # fmt: skip
"""Chip -> topologies that its compiler knows."""
_TPU = re.compile(r"(?:(\d+)\s*x\s+)?([a-z]\w*):(\d+(?:x\d+)+)")
_LOCAL = re.compile(r"local(?::(\d+))?")
_FORMS = (
    "expected CHIP:SHAPE, such as v5e:16x16 or, of several slices, '2x v5e:16x16'; or local, the "
    "devices that are here, or local:N, so many that a CPU pretends to have"
)


@dataclass(frozen=True)
class Topology:
    """What is planned for.

    Attributes:
      chip: v4, v5e, v5p, v6e or tpu7x; "local": the devices of this machine.
      shape: chips along each axis of a slice; of local devices their number, () for all there are.
      num_slices: slices, which a slower network connects.
    """

    chip: str
    shape: tuple[int, ...] = ()
    num_slices: int = 1

    @classmethod
    def parse(cls, text: str, num_slices: int | None = None) -> Topology:
        """Raises: UserError: if the text is none, or says another number of slices."""
        if found := _LOCAL.fullmatch(text.strip()):
            if num_slices not in (None, 1):
                raise UserError(f"--slices {num_slices}: the devices of this machine are one slice")
            return cls("local", () if found[1] is None else (_positive(text, found[1]),))
        found = _TPU.fullmatch(text.strip())
        if found is None:
            raise UserError(f"--topology {text!r}: {_FORMS}")
        times, chip, shape = found.groups()
        if chip not in EXAMPLES:
            raise UserError(f"--topology {text!r}: chip {chip!r} is none of {', '.join(EXAMPLES)}")
        told = num_slices if times is None else _positive(text, times)
        if num_slices not in (None, told):
            raise UserError(f"--topology {text!r} says {told} slices, --slices {num_slices}")
        sizes = tuple(_positive(text, size) for size in shape.split("x"))
        return cls(chip, sizes, 1 if told is None else _positive(text, str(told)))

    def __str__(self) -> str:
        if self.chip == "local":
            return ":".join(["local", *map(str, self.shape)])
        times = f"{self.num_slices}x " if self.num_slices > 1 else ""
        return f"{times}{self.chip}:{'x'.join(map(str, self.shape))}"

    @property
    def is_local(self) -> bool:
        return self.chip == "local"

    @property
    def num_chips(self) -> int | None:
        """Of all slices; None: as many as this machine has devices."""
        return math.prod(self.shape) * self.num_slices if self.shape else None


def prepare(topology: Topology, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what jax and libtpu read when they start: the compiler runs here, on no TPU.

    Raises:
      UserError: if libtpu, the compiler for TPUs, is not installed; or jax has started before.
    """
    if topology.is_local:
        if topology.shape and "jax" not in sys.modules:
            flags = [
                flag
                for flag in environment.get("XLA_FLAGS", "").split()
                if "xla_force_host_platform_device_count" not in flag
            ]
            number = f"--xla_force_host_platform_device_count={topology.shape[0]}"
            environment["XLA_FLAGS"] = " ".join([*flags, number])
            environment["JAX_PLATFORMS"] = "cpu"
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology}: the compiler for TPUs, libtpu, is not installed: "
            "pip install 'alignjax[plan]' (Linux, no TPU needed)"
        )
    environment["JAX_PLATFORMS"] = "cpu"
    # Else libtpu asks the cloud what machine this is, and waits for an answer.
    environment["TPU_SKIP_MDS_QUERY"] = "1"
    # Else one process of a machine may load it, which is for those that hold a TPU.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    environment.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    environment.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def devices(topology: Topology) -> list[jax.Device]:
    """The devices; those of a TPU can be compiled for and nothing else.

    Raises:
      UserError: if there is no such topology, or this machine has fewer devices.
    """
    import jax
    from jax.experimental import topologies

    if topology.is_local:
        found = jax.devices()
        wanted = topology.num_chips or len(found)
        if wanted > len(found):
            raise UserError(f"--topology {topology}: this machine has {len(found)} device(s)")
        return found[:wanted]
    options: dict[str, Any] = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    if topology.chip == "v4":
        options["chip_config_name"] = "megacore"  # One device a chip, as a program sees them.
    name = f"{topology.chip}:{'x'.join(map(str, topology.shape))}"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # What libtpu raises has no type of its own.
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--topology {topology}: the compiler knows no such slice ({reason}); try one of "
            f"{EXAMPLES[topology.chip]}"
        ) from error
    return list(found.devices)


def _positive(text: str, number: str) -> int:
    if int(number) < 1:
        raise UserError(f"--topology {text!r}: {number} is no number of devices; {_FORMS}")
    return int(number)
