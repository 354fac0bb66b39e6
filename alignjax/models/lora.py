"""Low-rank adapters beside the frozen kernels of a decoder: LoRA, rsLoRA, DoRA.

The adapter of a projection lies below it in the parameters, as `layers/attention/query/lora/{a,b}`:
a tree with adapters is a tree of a base and one of adapters (`split`, `combine`), and the base is a
tree of the same model without them, which is the reference policy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.core.precision import matmul_precision
from alignjax.models.layers import Linear
from alignjax.models.quantize import quantize_linear

if TYPE_CHECKING:
    from alignjax.core.types import Params
    from alignjax.models.transformer import Model


class LoraConfig(Config):
    """Which projections get an adapter, and of which kind (arXiv:2106.09685). Hashable."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    """What an adapter adds is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead: rank-stabilised (arXiv:2312.03732 eq. 3)."""
    dora: bool = False
    """Train the norm of each output's weights, too (arXiv:2402.09353)."""
    targets: tuple[str, ...] = ("*",)
    """Projections of a layer, as attention.query, or patterns of them, as mlp.*; default: all."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are left out in a step of training."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nnx.Module):
    """y = x W -> x W + scale * (x a) b; with a magnitude m, m / |W + scale * a b| times that.

    float32 parameters: `a` is uniform in +-1 / sqrt(inputs), as PEFT starts it, `b` is 0, and `m`
    starts as the norm of each output's weights, so that at first nothing is changed.
    """

    def __init__(self, linear: Linear, config: LoraConfig, rngs: nnx.Rngs):
        kernel = linear.kernel[...]
        inputs, outputs = linear.axes
        shape = kernel.shape[: len(inputs)]
        bound = 1 / math.sqrt(math.prod(shape))
        a = jax.random.uniform(
            rngs.params(), (*shape, config.rank), jnp.float32, minval=-bound, maxval=bound
        )
        b = jnp.zeros((config.rank, *kernel.shape[len(inputs) :]), jnp.float32)
        self.a = nnx.Param(a, logical_axes=(*inputs, "rank"))
        self.b = nnx.Param(b, logical_axes=("rank", *outputs))
        self.magnitude: nnx.Param | None = nnx.data(None)
        if config.dora:
            norm = column_norm(kernel.reshape(math.prod(shape), -1)).reshape(b.shape[1:])
            self.magnitude = nnx.Param(norm, logical_axes=outputs)
        self.scale, self.dropout = config.scale, config.dropout
        self.dropout_key = nnx.data(None)

    @property
    def matrices(self) -> tuple[Array, Array]:
        """a [inputs, r] and b [r, outputs], whatever axes these are made of."""
        rank = self.a.shape[-1]
        return self.a[...].reshape(-1, rank), self.b[...].reshape(rank, -1)

    def __call__(self, x: Array, kernel: Array, y: Array) -> Array:
        """x [N, inputs], kernel [inputs, outputs] and y = x kernel, in one dtype -> y adapted."""
        precision = matmul_precision(x.dtype)
        a, b = (matrix.astype(x.dtype) for matrix in self.matrices)
        dropped = x if self.dropout_key is None else _drop(x, self.dropout, self.dropout_key)
        low = self.scale * jnp.dot(dropped, a, precision=precision)
        y = y + jnp.dot(low, b, precision=precision)
        gain = self.gain(kernel)
        return y if gain is None else y * gain.astype(y.dtype)

    def merged(self, kernel: Array) -> Array:
        """[inputs, outputs] float32 -> the kernel that computes the same without an adapter."""
        a, b = self.matrices
        merged = kernel + self.scale * jnp.dot(a, b, precision=matmul_precision(a.dtype))
        gain = self.gain(kernel)
        return merged if gain is None else merged * gain

    def gain(self, kernel: Array) -> Array | None:
        """[outputs] float32: m / |W + scale * a b|, or None without a magnitude.

        The norm passes no gradient on (arXiv:2402.09353 sec. 4.3).
        """
        if self.magnitude is None:
            return None
        norm = adapted_norm(kernel.astype(jnp.float32), *self.matrices, self.scale)
        return self.magnitude[...].reshape(-1) / jax.lax.stop_gradient(norm)


def column_norm(matrix: Array) -> Array:
    """[inputs, outputs] -> [outputs]: the Euclidean norm of each output's weights."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=0))


def adapted_norm(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """`column_norm(kernel + scale * a b)`, float32, without a product as large as the kernel.

    |w + s a b|^2 = |w|^2 + 2 s (a' w) b + s^2 b' (a' a) b for each output.
    """
    dot = lambda x, y: jnp.dot(x, y, precision=matmul_precision(x.dtype))  # noqa: E731
    both = jnp.sum(b * (2 * scale * dot(a.T, kernel) + scale**2 * dot(dot(a.T, a), b)), axis=0)
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0) + both)


def _drop(x: Array, rate: float, key: Array) -> Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def linears(layer: nnx.Module) -> dict[str, Linear]:
    """Dotted path -> projection, of all that a module holds; adapters do not count."""
    found = (
        (".".join(map(str, path)), node)
        for path, node in nnx.iter_graph(layer)
        if isinstance(node, Linear)
    )
    return dict(sorted(found))


def adapt(layer: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives an adapter to each projection of a layer that a pattern of `targets` names.

    Raises:
      UserError: if a pattern names none.
    """
    projections = linears(layer)
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in projections):
            raise UserError(
                f"lora.targets: {pattern!r} names no projection; there are {', '.join(projections)}"
            )
    for name, linear in projections.items():
        if any(fnmatchcase(name, pattern) for pattern in config.targets):
            linear.lora = Adapter(linear, config, rngs)


def set_dropout(layer: nnx.Module, key: Array) -> None:
    """Has the adapters of a bound layer leave out inputs, each others than its neighbours."""
    adapters = [linear.lora for linear in linears(layer).values() if linear.lora is not None]
    for number, adapter in enumerate(adapters):
        adapter.dropout_key = jax.random.fold_in(key, number)


# --- trees of parameters ------------------------------------------------------------------------


def split(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of a model with adapters -> (adapters, base). No array is copied."""
    adapters, base = {}, {}
    for name, value in params.items():
        if name == "lora":
            adapters[name] = value
        elif isinstance(value, Mapping):
            inner, base[name] = split(value)
            if inner:
                adapters[name] = inner
        else:
            base[name] = value
    return adapters, base


def combine(base: Params, adapters: Params) -> dict[str, Any]:
    """What `split` took apart. No array is copied."""
    both = dict(base)
    for name, value in adapters.items():
        both[name] = combine(base[name], value) if name in base else value
    return both


def init(model: Model, frozen: Params, key: Array) -> dict[str, Any]:
    """New adapters on a base that has none, for `combine`; the model without `lora` computes the
    same as with them."""

    def add(layer: nnx.Module, number: Array) -> None:
        assert model.lora is not None
        adapt(layer, model.lora, nnx.Rngs(jax.random.fold_in(key, number)))

    return split(base(model).map_layers(frozen, add))[0]


def merge(model: Model, params: Params) -> dict[str, Any]:
    """Parameters with adapters, and perhaps codes -> float32 parameters of the bare model.

    The kernel of an adapted projection becomes W + scale * a b, times the gain of DoRA; a quantised
    W is what its codes stand for.
    """

    def change(layer: nnx.Module, _: Array) -> None:
        for linear in linears(layer).values():
            kernel = linear.kernel[...]
            if linear.lora is not None:
                flat = linear.lora.merged(kernel.reshape(linear.lora.matrices[0].shape[0], -1))
                kernel, linear.lora = flat.reshape(kernel.shape), None
            linear.kernel = nnx.Param(kernel)

    return model.map_layers(params, change)


def quantize(model: Model, params: Params) -> dict[str, Any]:
    """Parameters of a model without codes or adapters -> those of the base of `model`, which has
    codes. Other arrays are passed on as they are."""

    def change(layer: nnx.Module, _: Array) -> None:
        assert model.quantize is not None
        for linear in linears(layer).values():
            quantize_linear(linear, model.quantize)

    return plain(model).map_layers(params, change)


def quantize_base(model: Model, params: Params) -> dict[str, Any]:
    """As `quantize`, of parameters that may have adapters, which stay."""
    adapters, frozen = split(params)
    return combine(quantize(model, frozen), adapters)


def base(model: Model) -> Model:
    """The model without its adapters, as what `split` leaves is for."""
    return dataclasses.replace(model, lora=None)


def plain(model: Model) -> Model:
    """The model without adapters and codes, as what `merge` makes is for."""
    return dataclasses.replace(model, lora=None, quantize=None)
