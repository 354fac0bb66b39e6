"""An instruction of HLO -> the floating-point operations of its products."""

from __future__ import annotations

import re
from math import prod

import numpy as np

from alignjax.plan.hlo_text import Buffer, Computation, Instruction

UNKNOWN = -1.0
_HARMLESS = (
    "AllocateBuffer", "ConcatBitcast", "SliceId", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "AssumeGatherIndicesInBound", "TopK", "Sharding", "SPMDFullToShardShape",
    "SPMDShardToFullShape", "annotate_device_placement", "MoveToDevice", "MoveToHost",
)  # fmt: skip
"""Custom calls that multiply no matrices."""
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of the Pallas kernels of splash attention for each pair of blocks: scores and outputs;
scores, their gradient and that of the queries; scores, their gradient, those of keys and values."""


def flops(computation: Computation, each: Instruction) -> float:
    """Two for each multiplication and addition of a product; 0 of what is none; UNKNOWN of custom
    calls on floats that do not say it.

    Custom calls say it in `cost_estimate` of their configuration. Those of splash attention do not:
    all pairs of blocks that the mask does not rule out count, those on the diagonal whole, as the
    kernel multiplies them. Segments rule out none.
    """
    if each.opcode == "dot":
        left = _operand(computation, each, 0)
        contracted = each.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        sizes = (left.dims[int(dim)] for dim in contracted.split(",") if dim)
        return 2.0 * sum(buffer.size for buffer in each.shape) * prod(sizes)
    if each.opcode == "convolution":
        return _convolution(computation, each)
    if each.opcode == "custom-call":
        return _custom_call(computation, each)
    return 0.0


def _operand(computation: Computation, each: Instruction, number: int) -> Buffer:
    return computation.instructions[each.operands[number]].shape[0]


def _convolution(computation: Computation, each: Instruction) -> float:
    """Positions of the window that lie on padding or between dilated elements do not count: TPU
    programs write products of a batch as a convolution that has only those besides."""
    left, right = (_operand(computation, each, number) for number in (0, 1))
    labels = each.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    if not labels:
        raise ValueError(f"{each.name}: a convolution without dim_labels")
    lhs, rhs, out = re.split(r"_|->", labels)
    window = each.attribute(r"\bwindow=\{([^}]*)\}") or ""
    spatial = sorted(label for label in rhs if label.isdigit())
    pairs = 1
    for label in spatial:
        pairs *= _pairs(
            _Window(window, int(label)),
            left.dims[lhs.index(label)],
            right.dims[rhs.index(label)],
            each.shape[0].dims[out.index(label)],
        )
    features = right.dims[rhs.index("i")] * each.shape[0].dims[out.index("f")]
    batch_groups = int(each.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * pairs * features * left.dims[lhs.index("b")] / batch_groups


class _Window:
    """One dimension of text such as "size=4x8 stride=3x7 pad=0_0x1_1 lhs_dilate=4x8"."""

    def __init__(self, text: str, number: int) -> None:
        def get(name: str, default: str) -> int:
            found = re.search(rf"\b{name}=([\dx_\-]+)", text)
            each = found.group(1).split("x")[number] if found else default
            return int(each.split("_")[0])

        self.stride, self.pad_low = get("stride", "1"), get("pad", "0")
        self.lhs_dilate, self.rhs_dilate = get("lhs_dilate", "1"), get("rhs_dilate", "1")


def _pairs(window: _Window, size: int, kernel: int, out: int) -> int:
    """Pairs of an output and a position of the kernel that meet an element of the input."""
    places = np.arange(out) * window.stride - window.pad_low
    found = 0
    for position in range(kernel):
        at = places + position * window.rhs_dilate
        is_in = (at >= 0) & (at < size * window.lhs_dilate) & (at % window.lhs_dilate == 0)
        found += int(np.count_nonzero(is_in))
    return found


def _custom_call(computation: Computation, each: Instruction) -> float:
    stated = each.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
    if stated:
        return float(stated)
    operands = [buffer for name in each.operands for buffer in computation.instructions[name].shape]
    found = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", each.name)
    if found:
        return _splash(operands, found.group(1))
    target = each.attribute(r'custom_call_target="([^"]*)"')
    matrices = [buffer for buffer in operands if buffer.is_float and len(buffer.dims) >= 2]
    return 0.0 if target in _HARMLESS or len(matrices) < 2 else UNKNOWN


def _splash(operands: list[Buffer], kind: str) -> float:
    """Of the operands the first three-dimensional one of integers is a table [heads or 1, blocks of
    queries, blocks of keys that one needs at most], or, where gradients of keys are computed,
    [heads or 1, blocks of queries that need one at most, blocks of keys]; the first two of floats
    are queries [..., T, head_dim] and keys [..., S, head_dim]. T is less than S where devices share
    a row: each has then queries that see as many keys as those of all on average.
    """
    table = next(buffer for buffer in operands if len(buffer.dims) == 3 and not buffer.is_float)
    q, k = [buffer for buffer in operands if buffer.is_float and len(buffer.dims) >= 3][:2]
    rows, columns = table.dims[1:]
    if kind == "dkv":
        num_blocks = columns
        is_windowed = rows < columns * q.dims[-2] // k.dims[-2]
        most = rows if is_windowed else num_blocks
    else:
        num_blocks, most = rows * k.dims[-2] // q.dims[-2], columns
    needed = sum(min(row + 1, most) for row in range(num_blocks)) / num_blocks**2
    return 2.0 * _SPLASH[kind] * q.size * k.dims[-2] * needed
