"""Argument names of the loss functions -> what they hold: shape, range, and whether it carries
gradient.

The names are a vocabulary that all of `alignjax.losses` shares. So a function that is new is drawn
arguments for, and put to every test of properties, by its signature alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


@dataclass(frozen=True)
class Argument:
    """What an array of this name holds.

    Attributes:
      axes: "BT" token rows, "NG" groups of completions, "NK" ranked responses, "N" examples or
        pairs, "NGR" groups with R rewards each, "BTK" top-k lists, "" a scalar.
      low, high: range of the entries drawn.
      carries_gradient: False where the functions must stop the gradient.
      kind: "float", "int" or "bool".
    """

    axes: str
    low: float = -1.0
    high: float = 1.0
    carries_gradient: bool = False
    kind: str = "float"


def _logp(axes: str, carries: bool = False) -> Argument:
    return Argument(axes, -4.0, -0.02, carries)


TOKENS = {
    "logp": _logp("BT", True),
    "policy_logp": _logp("BT"),
    "old_logp": _logp("BT"),
    "ref_logp": _logp("BT"),
    "other_logp": _logp("BT"),
    "rollout_logp": _logp("BT"),
    "teacher_logp": _logp("BT"),
    "mean_logp": _logp("BT", True),
    "log_collision": _logp("BT"),
    "log_normalizer": Argument("BT", -3.0, 9.0, True),
    "entropy": Argument("BT", 0.0, 3.0, True),
    "loss": Argument("BT", -2.0, 2.0, True),
    "logits": Argument("BT", -4.0, 4.0, True),
    "labels": Argument("BT", 0.0, 1.0),
    "values": Argument("BT", -2.0, 2.0, True),
    "old_values": Argument("BT", -2.0, 2.0),
    "returns": Argument("BT", -2.0, 2.0),
    "advantage": Argument("BT", -2.0, 2.0),
    "rewards": Argument("BT", -2.0, 2.0),
    "bootstrap": Argument("BT", -2.0, 2.0),
    "kl": Argument("BT", -1.0, 2.0),
    "log_ratio": Argument("BT", -1.0, 1.0),
    "score": Argument("BT", -2.0, 2.0),
    "covariance": Argument("BT", -2.0, 6.0),
    "shared_len": Argument("BT", 1, 9, kind="int"),
}
"""Of functions with a `mask`: [B, T]."""

EXAMPLES = {
    "rewards": Argument("NG", -2.0, 2.0),
    "lengths": Argument("NG", 1, 9, kind="int"),
    "part_rewards": Argument("NGR", -2.0, 2.0),
    "greedy_rewards": Argument("N", -2.0, 2.0),
    "is_correct": Argument("NG", kind="bool"),
    "has_eos": Argument("NG", kind="bool"),
    "scores": Argument("NK", -2.0, 2.0, True),
    "ranks": Argument("NK", 1, 4, kind="int"),
    "chosen_score": Argument("N", -2.0, 2.0, True),
    "rejected_score": Argument("N", -2.0, 2.0, True),
    "score": Argument("N", -2.0, 2.0, True),
    "target": Argument("N", -2.0, 2.0),
    "sequence_logp": Argument("N", -20.0, -0.5, True),
    "ref_sequence_logp": Argument("N", -20.0, -0.5),
    "is_desirable": Argument("N", kind="bool"),
    "loss": Argument("N", -2.0, 2.0, True),
    "weights": Argument("N", 0.1, 1.0),
    "mismatched_logp": Argument("N", -20.0, -0.5),
    "ref_mismatched_logp": Argument("N", -20.0, -0.5),
    "preference_prob": Argument("N", 0.0, 1.0),
    "margin": Argument("N", 0.0, 2.0),
    "kl": Argument("", 0.0, 2.0),
    "delta": Argument("", -1.0, 1.0),
}
"""Of functions with `is_valid`, which has the axes of their first argument."""

PAIRS = {
    "chosen": Argument("N", -20.0, -0.5, True),
    "rejected": Argument("N", -20.0, -0.5, True),
    "ref_chosen": Argument("N", -20.0, -0.5),
    "ref_rejected": Argument("N", -20.0, -0.5),
    "chosen_len": Argument("N", 1, 9, kind="int"),
    "rejected_len": Argument("N", 1, 9, kind="int"),
}
"""Fields of `Pairs`, besides `is_valid`; functions of `pairs` may take EXAMPLES beside them."""

SIZES = {"B": 3, "T": 8, "N": 5, "G": 4, "K": 4, "R": 2}


def names(function: Callable[..., Any]) -> list[str]:
    """The positional arguments of a loss function: its arrays."""
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is by_position]


def argument(function: Callable[..., Any], name: str) -> Argument:
    """What `name` holds among the arguments of `function`."""
    table = TOKENS if "mask" in names(function) else EXAMPLES
    if name not in table:
        raise KeyError(f"{function.__name__}: no array named {name!r} is known; see {__file__}")
    return table[name]


def shape(axes: str) -> tuple[int, ...]:
    return tuple(SIZES[axis] for axis in axes)


def _masks(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(bool, shape)


def _entries(what: Argument) -> st.SearchStrategy[np.ndarray]:
    if what.kind == "bool":
        return hnp.arrays(bool, shape(what.axes))
    if what.kind == "int":
        elements = st.integers(int(what.low), int(what.high))
        return hnp.arrays(np.int32, shape(what.axes), elements=elements)
    # Multiples of 1/64: float32 holds them and their differences exactly, so that what is equal in
    # float64 is equal in float32, ties included.
    low, high = round(what.low * 64), round(what.high * 64)
    steps = hnp.arrays(np.int32, shape(what.axes), elements=st.integers(low, high))
    return steps.map(lambda x: x.astype(np.float64) / 64)


@st.composite
def drawn(draw: st.DrawFn, function: Callable[..., Any]) -> dict[str, Any]:
    """Clean float64 arguments on a random ragged batch; see `dirtied` for what is off mask."""
    out: dict[str, Any] = {}
    wanted = names(function)
    for name in wanted:
        if name == "mask":
            out[name] = draw(_masks(shape("BT")))
        elif name == "is_valid":
            out[name] = draw(_masks(shape(_valid_axes(function))))
        elif name == "segment_ids":
            steps = draw(_masks(shape("BT")))
            steps[:, 0] = True
            out[name] = np.cumsum(steps, axis=1, dtype=np.int32)
        elif name == "pairs":
            fields = {field: draw(_entries(what)) for field, what in PAIRS.items()}
            out[name] = fields | {"is_valid": draw(_masks(shape("N")))}
        else:
            out[name] = draw(_entries(argument(function, name)))
    return out


def sampled(function: Callable[..., Any], seed: int) -> dict[str, Any]:
    """The same from a generator: no entry lies on a kink, where a derivative is not defined."""
    rng = np.random.default_rng(seed)

    def entries(what: Argument) -> np.ndarray:
        if what.kind == "bool":
            return rng.random(shape(what.axes)) < 0.5
        if what.kind == "int":
            return rng.integers(int(what.low), int(what.high) + 1, shape(what.axes), np.int32)
        return rng.uniform(what.low, what.high, shape(what.axes))

    out: dict[str, Any] = {}
    for name in names(function):
        if name == "mask":
            out[name] = rng.random(shape("BT")) < 0.7
        elif name == "is_valid":
            out[name] = rng.random(shape(_valid_axes(function))) < 0.8
        elif name == "segment_ids":
            out[name] = np.sort(rng.integers(1, 4, shape("BT"), np.int32), axis=1)
        elif name == "pairs":
            fields = {field: entries(what) for field, what in PAIRS.items()}
            out[name] = fields | {"is_valid": rng.random(shape("N")) < 0.8}
        else:
            out[name] = entries(argument(function, name))
    return out


def _valid_axes(function: Callable[..., Any]) -> str:
    """The axes of `is_valid`: those of the first argument, without that of several rewards."""
    first = names(function)[0]
    return "N" if first == "pairs" else argument(function, first).axes.removesuffix("R")


def dirtied(function: Callable[..., Any], args: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Off the mask floats become nan, inf or huge, and integers senseless: none may be read."""
    rng = np.random.default_rng(seed)

    def dirty(x: np.ndarray, on: np.ndarray) -> np.ndarray:
        if x.dtype == bool or x.ndim < on.ndim:
            return x
        on = on.reshape(on.shape + (1,) * (x.ndim - on.ndim))
        if np.issubdtype(x.dtype, np.integer):
            return np.where(on, x, rng.choice([-3, 0, 2**31 - 1], x.shape)).astype(x.dtype)
        return np.where(on, x, rng.choice([np.nan, np.inf, -np.inf, -1e30, 0.0], x.shape))

    if "pairs" in args:
        fields = args["pairs"]
        on = fields["is_valid"]
        fields = {name: dirty(x, on) for name, x in fields.items()}
        # In the order of the arguments, which are given by position.
        return {k: fields if k == "pairs" else dirty(x, on) for k, x in args.items()}
    on = args.get("mask", args.get("is_valid"))
    return {name: dirty(x, on) for name, x in args.items()}
