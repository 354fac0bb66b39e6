"""A loss function and its float64 oracle -> the tests that hold one to the other."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from jax import Array

from alignjax import losses
from tests.losses import arguments


@dataclass(frozen=True)
class Case:
    """One function with one setting of its hyperparameters.

    Attributes:
      function: takes arrays by position, hyperparameters by keyword.
      oracle: NumPy; the same arguments by keyword, clean and float64 (`pairs` as a dict of arrays),
        and the options. Returns what the function does, as an array or a tuple of arrays. With
        `frozen`, it is also given the dict of the arguments before they were perturbed, as
        `frozen`: what the paper stops the gradient of is computed from those.
      options: hyperparameters, given to both.
      frozen: whether the oracle asks for `frozen`.
      rtol: of the float32 comparison, relative to the largest entry of the result.
      atol: of the float32 comparison.
    """

    function: Callable[..., Any]
    oracle: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    rtol: float = 2e-5
    atol: float = 2e-6

    @property
    def name(self) -> str:
        given = "_".join(f"{k}_{v}" for k, v in self.options.items())
        return f"{self.function.__name__}__{given}" if given else self.function.__name__


def arrays(args: dict[str, Any], dtype: Any) -> list[Any]:
    """Arguments by name -> jax arrays by position, floats in `dtype`."""

    def convert(x: np.ndarray) -> Array:
        return jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else x.dtype)

    return [
        losses.Pairs(**{k: convert(v) for k, v in x.items()}) if name == "pairs" else convert(x)
        for name, x in args.items()
    ]


def oracle_tests(cases: Sequence[Case]) -> type[chex.TestCase]:
    """A test class: values by hypothesis, jitted and not; gradients by finite differences."""
    named = [(case.name, case) for case in cases]

    class TestOracles(chex.TestCase):
        @chex.variants(with_jit=True, without_jit=True)
        @parameterized.named_parameters(*named)
        def test_equals_its_oracle(self, case: Case) -> None:
            function = self.variant(functools.partial(case.function, **case.options))

            @settings(max_examples=12, deadline=None, derandomize=True, database=None)
            @given(args=arguments.drawn(case.function))
            def check(args: dict[str, Any]) -> None:
                dirt = arguments.dirtied(case.function, args)
                out = function(*arrays(dirt, jnp.float32))
                _same(out, _expected(case, args), rtol=case.rtol, atol=case.atol)

            check()

        @parameterized.named_parameters(*named)
        def test_equals_its_oracle_in_float64(self, case: Case) -> None:
            with jax.enable_x64(True):
                for seed in range(3):
                    args = arguments.sampled(case.function, seed)
                    dirt = arguments.dirtied(case.function, args, seed)
                    out = case.function(*arrays(dirt, jnp.float64), **case.options)
                    _same(out, _expected(case, args), rtol=1e-10, atol=1e-12)

        @parameterized.named_parameters(*named)
        def test_gradient_equals_finite_differences_of_its_oracle(self, case: Case) -> None:
            args = arguments.sampled(case.function, 3)
            dirt = arguments.dirtied(case.function, args, 3)
            rng = np.random.default_rng(7)
            results = [x for x in _leaves(_expected(case, args)) if x.dtype != bool]
            weights = [rng.normal(size=x.shape) for x in results]

            def weighted(out: Any) -> Any:
                floats = [x for x in _leaves(out) if x.dtype != bool]
                terms = ((w * x).sum() for w, x in zip(weights, floats, strict=True))
                return sum(terms, 0.0)  # a float also where all results are bool

            with jax.enable_x64(True):
                leaves, tree = jax.tree.flatten(arrays(dirt, jnp.float64))
                at = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

                def total(floats: list[Array]) -> Array:
                    given = dict(zip(at, floats, strict=True))
                    filled = [given.get(i, x) for i, x in enumerate(leaves)]
                    return weighted(case.function(*tree.unflatten(filled), **case.options))

                grads = jax.grad(total)([leaves[i] for i in at])
            for grad, (name, x) in zip(grads, _floats(args), strict=True):
                expected = np.zeros(x.shape)
                if _carries(case, name):
                    expected = _differences(
                        lambda a: weighted(_expected(case, a, args)), args, name
                    )
                largest = np.abs(expected).max(initial=1.0)
                np.testing.assert_allclose(
                    grad, expected, rtol=1e-5, atol=1e-6 * largest, err_msg=f"by {name}"
                )

    return TestOracles


def _expected(case: Case, args: dict[str, Any], before: dict[str, Any] | None = None) -> Any:
    frozen = {"frozen": args if before is None else before} if case.frozen else {}
    with np.errstate(all="ignore"):
        return case.oracle(**args, **case.options, **frozen)


def _leaves(out: Any) -> list[Any]:
    return list(out) if isinstance(out, tuple) else [out]


def _same(out: Any, expected: Any, *, rtol: float, atol: float) -> None:
    got, wanted = _leaves(out), _leaves(expected)
    assert len(got) == len(wanted), f"{len(got)} results, the oracle has {len(wanted)}"
    for x, y in zip(got, wanted, strict=True):
        y = np.asarray(y)
        assert x.shape == y.shape, f"{x.shape}, the oracle's {y.shape}"
        if y.dtype == bool:
            np.testing.assert_array_equal(x, y)
        else:
            largest = np.abs(y).max(initial=0.0)
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol + rtol * largest)


def _floats(args: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """The float arrays among the arguments, in the order of their leaves; `pairs.chosen`."""
    found = []
    for name, x in args.items():
        fields = {f"pairs.{k}": v for k, v in x.items()} if name == "pairs" else {name: x}
        found += [(k, v) for k, v in fields.items() if np.issubdtype(v.dtype, np.floating)]
    return found


def _carries(case: Case, name: str) -> bool:
    if name.startswith("pairs."):
        return arguments.PAIRS[name.removeprefix("pairs.")].carries_gradient
    return arguments.argument(case.function, name).carries_gradient


def _differences(value: Callable[[dict], float], args: dict[str, Any], name: str) -> np.ndarray:
    """Central differences of `value` by each entry of the argument `name`."""
    field = name.removeprefix("pairs.")
    x = args["pairs"][field] if name.startswith("pairs.") else args[name]
    slopes, step = np.zeros(x.shape), 1e-6

    def moved(index: tuple[int, ...], by: float) -> dict[str, Any]:
        y = x.copy()
        y[index] += by
        if name.startswith("pairs."):
            return {**args, "pairs": {**args["pairs"], field: y}}
        return {**args, name: y}

    for index in np.ndindex(x.shape):
        slopes[index] = (value(moved(index, step)) - value(moved(index, -step))) / (2 * step)
    return slopes
