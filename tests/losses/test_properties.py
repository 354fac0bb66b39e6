"""What every function of `alignjax.losses` owes: found by signature, so that a new one is tested.

Padding garbage reaches neither value nor gradient; padding side, packing, batch order,
micro-batches and devices change nothing; extremes stay finite; nothing masked gives zeros;
bfloat16 is computed with in float32; no gradient flows where none should.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax import losses
from alignjax.core.types import Weighted
from tests.losses import arguments
from tests.losses.arguments import Argument
from tests.losses.layouts import LENGTHS, OTHERS, PLAIN, lay_out, starts, targets

OPTIONS: dict[str, dict[str, Any]] = {
    "clip_cov_mask": {"key": jax.random.key(0), "frac": 0.2, "cov_low": 0.0},
    "clip_rewards": {"low": -1.0, "high": 0.5},
    "fixed_length": {"max_len": 16},
    "kl_cov_mask": {"frac": 0.2},
    "off_policy_sequence_mask": {"max_divergence": 0.1},
    "pass_at_k": {"k": 2},
    "sequence_logps": {"num_segments": 3},
    "token_rewards": {"kl_coef": 0.1},
    "wpo_weights": {"num_segments": 3},
}
"""Hyperparameters that have no default, or one at which nothing happens on so small a batch."""

NOT_OF_ARRAYS = {
    "adaptive_kl_control": "takes a state; tests/losses/test_control.py",
    "fixed_kl_control": "takes a state; tests/losses/test_control.py",
    "init_moments": "a state; tests/losses/test_shaping.py",
    "mixture": "of other losses, which are tested here",
    "normalize_rewards": "takes a state; tests/losses/test_shaping.py",
    "overlong_penalty": "of each length by itself; nothing is masked",
    "policy_loss": "takes an algorithm; tests/losses/test_presets.py tests each preset",
    "target_kl_control": "takes a state; tests/losses/test_control.py",
    "update_moments": "takes a state; tests/losses/test_shaping.py",
}
"""Functions that none of this applies to, and why."""

WHOLE_BATCH = {
    "aot": "sorts the margins of all pairs",
    "aot_unpaired": "sorts the log-ratios of all pairs",
    "clip_cov_mask": "draws a share of all tokens",
    "gdpo": "whitens over all samples",
    "global_whiten": "whitens over all tokens",
    "gpg": "scales by the share of groups that agree",
    "kl_cov_mask": "takes a share of all tokens",
    "micro_batch_mean": "is the mean over what it is given",
    "reinforce_pp": "whitens over all tokens",
    "reinforce_pp_baseline": "whitens over all samples",
    "token_covariance": "centers over all tokens",
    "top_entropy_mask": "takes a share of all tokens",
}
"""Functions whose definition is over the whole batch: a split must change them."""

NO_GRADIENT = {
    "implicit_rewards": "are metrics",
    "off_policy_sequence_mask": "is a mask",
    "token_covariance": "ranks tokens",
    "top_entropy_mask": "is a mask",
    "wpo_weights": "are weights",
}
"""Functions that stop the gradient of an argument that carries it in others."""

BY_PLACE = {"clip_cov_mask": "draws by place in the batch"}
"""Functions whose result depends on where in the batch a token stands."""

D, V, K = 5, 11, 3
VOCABULARY = {
    "hidden": Argument("BTD", -2.0, 2.0, True),
    "unembedding": Argument("DV", -1.0, 1.0, True),
    "tokens": Argument("BT", 0, V - 1, kind="int"),
    "teacher_hidden": Argument("BTD", -2.0, 2.0),
    "teacher_unembedding": Argument("DV", -1.0, 1.0),
    "teacher_ids": Argument("BTK", 0, V - 1, kind="int"),
    "teacher_logps": Argument("BTK", -4.0, -2.0),
}
"""Arguments of functions of `hidden`. Hidden states are those that predict the next token."""

SEGMENTS = 3
"""At most so many sequences in a row."""

FUNCTIONS = {
    name: function
    for name in losses.__all__
    if inspect.isfunction(function := getattr(losses, name)) and name not in NOT_OF_ARRAYS
}
TOKENS = [name for name, f in FUNCTIONS.items() if "mask" in arguments.names(f)]
EXAMPLES = [name for name in FUNCTIONS if name not in TOKENS]


def test_every_function_is_of_a_kind():
    for name in EXAMPLES:
        assert {"is_valid", "pairs"} & set(arguments.names(FUNCTIONS[name])), (
            f"{name} has neither mask, is_valid nor pairs: say why in NOT_OF_ARRAYS"
        )
    listed = {*OPTIONS, *NOT_OF_ARRAYS, *WHOLE_BATCH, *NO_GRADIENT, *BY_PLACE}
    assert listed <= set(losses.__all__), "a function listed here does not exist"


def called(name: str) -> Callable[..., Any]:
    return functools.partial(FUNCTIONS[name], **OPTIONS.get(name, {}))


def what(name: str, argument: str) -> Argument:
    if "hidden" in arguments.names(FUNCTIONS[name]) and argument in VOCABULARY:
        return VOCABULARY[argument]
    return arguments.argument(FUNCTIONS[name], argument)


# --- token rows -----------------------------------------------------------------------------------


def entries(rng: np.random.Generator, of: Argument, shape: tuple[int, ...]) -> np.ndarray:
    if of.kind == "bool":
        return rng.random(shape) < 0.5
    if of.kind == "int" and of.axes == "BTK":  # a list names each entry once
        rows = [rng.permutation(V)[:K] for _ in range(shape[0])]
        return np.array(rows, np.int32).reshape(shape)
    if of.kind == "int":
        return rng.integers(int(of.low), int(of.high) + 1, shape, np.int32)
    return rng.uniform(of.low, of.high, shape).astype(np.float32)


def rows(name: str, layout=PLAIN, time: int = 12, left: bool = False) -> dict[str, np.ndarray]:
    """Sequences laid out, layout [[i, j], [k], ...] by row; the first half of each is a prompt.

    Arguments off the mask are dirt.
    """
    rng, sizes = np.random.default_rng(4), {"D": D, "V": V, "K": K}
    others, made = {}, [{} for _ in LENGTHS]
    for argument in arguments.names(FUNCTIONS[name]):
        if argument in ("mask", "segment_ids"):
            continue
        of = what(name, argument)
        if not of.axes.startswith("BT"):
            others[argument] = entries(rng, of, tuple(sizes[axis] for axis in of.axes))
            continue
        trailing = tuple(sizes[axis] for axis in of.axes[2:])
        for sequence, length in zip(made, LENGTHS, strict=True):
            x = entries(rng, of, (length, *trailing))
            # A hidden state predicts the token after it, so it is read one step before the mask.
            off = ~np.roll(targets(length), -1 if argument.endswith("hidden") else 0)
            x[off] = {"float": np.nan, "int": -7, "bool": True}[of.kind]
            sequence[argument] = x
    out = others | lay_out(made, layout, time, left)
    return {argument: out[argument] for argument in arguments.names(FUNCTIONS[name])}


def by_sequence(out: Any, layout, time: int, left: bool = False) -> list[np.ndarray]:
    """Results of any layout -> the same arrays in the order of the sequences."""
    found = []
    for x in jax.tree.leaves(out):
        x = np.asarray(x)
        places = sorted(starts(layout, time, left).items())
        if x.ndim < 2:
            found.append(x)
        elif x.shape[:2] == (len(layout), time):
            found += [x[row, at : at + LENGTHS[i]] for i, (row, at) in places]
        else:  # one entry for each sequence of a row
            assert x.shape[:2] == (len(layout), SEGMENTS)
            found += [x[row, layout[row].index(i)] for i, (row, _) in places]
    return found


def same(a: Any, b: Any, rtol: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(np.float64(x)).all()
        np.testing.assert_allclose(np.float64(x), np.float64(y), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", [n for n in TOKENS if n not in BY_PLACE])
def test_layout_does_not_matter(name):
    function = jax.jit(called(name))
    plain = by_sequence(function(**rows(name)), PLAIN, 12)
    assert any(np.any(x) for x in plain), "all zeros would be equal whatever the layout"
    for layout, time, left in OTHERS:
        out = function(**rows(name, layout, time, left))
        same(by_sequence(out, layout, time, left), plain)


# --- all kinds: a batch is a dict of arrays ------------------------------------------------------


def batch(name: str) -> dict[str, Any]:
    """A batch of 8: token rows, examples, groups or pairs; `pairs` is a dict of arrays."""
    if name in TOKENS:
        return rows(name)
    function, sizes = FUNCTIONS[name], {**arguments.SIZES, "N": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "SIZES", sizes)
        args = arguments.sampled(function, 5)
        if "rewards" in args:
            args["rewards"][0] = 1.0  # one group that agrees
        args = arguments.dirtied(function, args, 5)
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, args)


UNTYPED = ("mask", "segment_ids", "is_valid", "pairs")


def has_batch_axis(name: str, argument: str) -> bool:
    return argument in UNTYPED or what(name, argument).axes.startswith(("B", "N"))


def of_rows(name: str, args: dict[str, Any], change: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """`change` on everything that has a batch axis."""
    return {k: jax.tree.map(change, x) if has_batch_axis(name, k) else x for k, x in args.items()}


@functools.cache
def compiled(name: str) -> Callable[[dict[str, Any]], Any]:
    return jax.jit(apply(name))


def apply(name: str) -> Callable[[dict[str, Any]], Any]:
    """The function of a batch."""

    def run(args: dict[str, Any]) -> Any:
        if "pairs" in args:
            args = {**args, "pairs": losses.Pairs(**args["pairs"])}
        return called(name)(**args)

    return run


def floats(args: Any) -> Any:
    """The float arrays of a batch; None stands for others."""
    return jax.tree.map(lambda x: x if np.issubdtype(x.dtype, np.floating) else None, args)


@functools.cache
def gradient(name: str) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """Batch -> (results, gradients of their sum by each float array)."""

    def run(args: dict[str, Any]) -> tuple[Any, Any]:
        def total(given: Any) -> tuple[Any, Any]:
            is_none = lambda x: x is None  # noqa: E731
            filled = jax.tree.map(
                lambda new, old: old if new is None else new, given, args, is_leaf=is_none
            )
            out = apply(name)(filled)
            kept = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
            # In unequal parts, so that no error of one entry cancels that of another.
            weights = [jnp.cos(1.0 + jnp.arange(x.size)).reshape(x.shape) for x in kept]
            return sum(((w * x).sum() for w, x in zip(weights, kept, strict=True)), 0.0), out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(floats(args))
        return out, grads

    return jax.jit(run)


ALL = [*TOKENS, *EXAMPLES]


@pytest.mark.parametrize("name", ALL)
def test_garbage_off_mask_reaches_neither_value_nor_gradient(name):
    args = batch(name)
    run = gradient(name)
    out, grads = run(args)
    rng = np.random.default_rng(8)

    def cleaned(x: np.ndarray, other: np.ndarray) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating):
            return x
        return np.where(np.isfinite(x) & (np.abs(x) < 1e6), x, other).astype(x.dtype)

    clean = jax.tree.map(lambda x: cleaned(x, rng.normal(size=x.shape)), args)
    same((out, grads), run(clean))


@pytest.mark.parametrize("name", ALL)
def test_gradient_flows_only_where_it_should(name):
    args = batch(name)
    _, grads = gradient(name)(args)
    flows = False
    for argument, grad in grads.items():
        if argument == "pairs":
            named = {k: (g, arguments.PAIRS[k]) for k, g in grad.items() if g is not None}
        else:
            named = {} if grad is None else {argument: (grad, what(name, argument))}
        for field, (g, of) in named.items():
            assert of.carries_gradient or not np.any(g), f"gradient by {field}"
            flows = flows or bool(np.any(g))
    arrays = [n for n in arguments.names(FUNCTIONS[name]) if n not in UNTYPED]
    carries = "pairs" in args or any(what(name, n).carries_gradient for n in arrays)
    assert flows == (carries and name not in NO_GRADIENT)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_do_not_matter(name):
    run = compiled(name)
    args = batch(name)
    whole = run(args)
    parts = [run(of_rows(name, args, lambda x: x[i : i + 2])) for i in range(0, 8, 2)]  # noqa: B023
    if isinstance(whole, Weighted):
        split = jax.tree.map(lambda *x: sum(x), *parts)
    else:
        split = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    if name in WHOLE_BATCH:
        with pytest.raises(AssertionError):
            same(split, whole)
    else:
        same(split, whole)


@pytest.mark.parametrize("name", [n for n in ALL if n not in BY_PLACE])
def test_batch_order_does_not_matter(name):
    run = compiled(name)
    args = batch(name)
    order = np.random.default_rng(6).permutation(8)
    whole, moved = run(args), run(of_rows(name, args, lambda x: x[order]))
    same(moved, jax.tree.map(lambda x: x[order] if x.ndim else x, whole))


@pytest.mark.parametrize("name", ALL)
def test_devices_do_not_matter(name):
    devices = jax.devices()[:8]
    assert len(devices) == 8
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,), devices=devices)
    args = batch(name)
    place = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    spread = of_rows(name, args, place(P("data")))
    spread = {k: x if has_batch_axis(name, k) else place(P())(x) for k, x in spread.items()}
    run = gradient(name)
    same(run(spread), run(args))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("low", [0.0, -1e4])
def test_finite_at_extreme_log_probs(name, low):
    """Every log-prob at 0 or at -1e4, those of policy and reference apart; other floats by 1e4."""
    args = batch(name)
    rng = np.random.default_rng(11)

    def extreme(argument: str, x: np.ndarray) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating):
            return x
        if "logp" in argument or argument in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
            return rng.choice(np.array([0.0, low], np.float32), x.shape)
        return x * np.float32(1e4) if "hidden" in argument else x

    for _ in range(2):
        changed = {
            k: {f: extreme(f, y) for f, y in x.items()} if k == "pairs" else extreme(k, x)
            for k, x in args.items()
        }
        for x in jax.tree.leaves(gradient(name)(changed)):
            assert np.isfinite(np.float32(x)).all()


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_counts_gives_zeros(name):
    args = batch(name)
    off = lambda x: np.zeros_like(x)  # noqa: E731
    for key in ("mask", "is_valid"):
        if key in args:
            args[key] = off(args[key])
    if "pairs" in args:
        args["pairs"] = {**args["pairs"], "is_valid": off(args["pairs"]["is_valid"])}
    for x in jax.tree.leaves(gradient(name)(args)):
        assert not np.any(np.asarray(x))


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_computed_with_in_float32(name):
    args = batch(name)
    half = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16) if np.issubdtype(x.dtype, np.floating) else x, args
    )
    full = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, half)
    run = compiled(name)
    out, expected = run(half), run(full)
    same(out, expected, rtol=2e-6)
    for x in jax.tree.leaves(out):
        assert not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.float32
