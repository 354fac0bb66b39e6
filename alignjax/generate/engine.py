"""A model -> a GenerateFn: pads calls to a ladder of shapes, compiles once for each, runs them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.core.types import LENGTH, STOP, Completions, Params, Sampling
from alignjax.generate.decode import Limits, decode
from alignjax.models import Model
from alignjax.sharding import put_batch
from alignjax.sharding.mesh import BATCH_AXES

_STOP_SLOTS = 8


def bucket(size: int, *, smallest: int = 8) -> int:
    """The smallest rung of the ladder 8, 12, 16, 24, 32, 48, 64, 96, ... that holds `size`."""
    rung = smallest
    while rung < size:
        rung = rung * 3 // 2 if rung & (rung - 1) == 0 else rung // 3 * 4
    return rung


class Engine:
    """Implements `core.types.GenerateFn` for one model.

    A call is padded to a bucket of (prompts, prompt width, completion width), so that ragged
    prompts and changing sampling parameters meet functions that are already compiled. The width of
    the prompt array counts, not the longest prompt in it: a caller that fixes its width never
    recompiles.
    """

    def __init__(
        self, model: Model, *, mesh: jax.sharding.Mesh | None = None, max_rows: int = 1024
    ):
        """Args: mesh: rows are sharded over its data and fsdp axes; max_rows: the most completions
        that are sampled at once; more are sampled in turns, with the same result."""
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected at least 1")
        self.model = model
        self.mesh = mesh
        self.max_rows = max_rows
        self._decode = jax.jit(
            functools.partial(decode, model=model), static_argnames=("num_samples", "capacity")
        )

    @property
    def num_compilations(self) -> int:
        """How many shapes have been compiled so far."""
        return self._decode._cache_size()

    def __call__(
        self,
        params: Params,
        prompts: np.ndarray,
        lengths: np.ndarray,
        key: Array,
        sampling: Sampling,
    ) -> Completions:
        """See `core.types.GenerateFn`. Raises ValueError on settings that make no sense."""
        prompts, lengths = np.asarray(prompts, np.int32), np.asarray(lengths, np.int32)
        _check(prompts, lengths, sampling, self.model.config.max_position_embeddings)
        limits = Limits(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(sampling.top_k),
            top_p=jnp.float32(sampling.top_p),
            max_tokens=jnp.int32(sampling.max_tokens),
            stop_tokens=jnp.array(
                [*sampling.stop_tokens, *[-1] * (_STOP_SLOTS - len(sampling.stop_tokens))],
                jnp.int32,
            ),
        )
        per_turn = max(1, self.max_rows // sampling.num_samples)
        turns = [
            self._turn(params, prompts[i : i + per_turn], lengths[i : i + per_turn], key, limits,
                       sampling, first_row=i * sampling.num_samples)
            for i in range(0, len(prompts), per_turn)
        ]  # fmt: skip
        tokens, logps, counts, is_stopped = (
            np.concatenate(parts) for parts in zip(*turns, strict=True)
        )
        reasons = np.where(is_stopped, STOP, LENGTH).astype(np.int8)
        return Completions(tokens, counts, logps, reasons)

    def _turn(
        self, params: Params, prompts: np.ndarray, lengths: np.ndarray, key: Array, limits: Limits,
        sampling: Sampling, *, first_row: int,
    ) -> list[np.ndarray]:  # fmt: skip
        num_prompts, width = prompts.shape
        num_devices = (
            1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        )
        rows = -(-bucket(num_prompts) // num_devices) * num_devices
        padded = np.zeros((rows, bucket(width)), np.int32)
        padded[:num_prompts, :width] = prompts
        padded_lengths = np.zeros(rows, np.int32)
        padded_lengths[:num_prompts] = lengths
        row_ids = first_row + np.arange(rows * sampling.num_samples)
        row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)
        batch = {"prompts": padded, "lengths": padded_lengths}
        if self.mesh is not None:
            batch = put_batch(batch, self.mesh, 0)
        out = self._decode(
            params, batch["prompts"], batch["lengths"], row_keys, limits,
            num_samples=sampling.num_samples, capacity=bucket(sampling.max_tokens),
        )  # fmt: skip
        real = num_prompts * sampling.num_samples
        tokens, logps, counts, is_stopped = jax.device_get(out)
        columns = sampling.max_tokens
        return [tokens[:real, :columns], logps[:real, :columns], counts[:real], is_stopped[:real]]


def make_generate(
    model: Model, *, mesh: jax.sharding.Mesh | None = None, max_rows: int = 1024
) -> Engine:
    """The engine for a model; see `Engine`."""
    return Engine(model, mesh=mesh, max_rows=max_rows)


def _check(prompts: np.ndarray, lengths: np.ndarray, sampling: Sampling, context: int) -> None:
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or not len(prompts):
        raise ValueError(
            f"prompts {prompts.shape}, lengths {lengths.shape}: expected [B, P] and [B] with B >= 1"
        )
    if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()}: expected 1 to {prompts.shape[1]}, "
            "the width of prompts; an empty prompt needs at least a bos token"
        )
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"{sampling}: expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1")
    if sampling.max_tokens < 1 or sampling.num_samples < 1:
        raise ValueError(f"{sampling}: expected max_tokens and num_samples of at least 1")
    if len(sampling.stop_tokens) > _STOP_SLOTS:
        raise ValueError(f"{len(sampling.stop_tokens)} stop tokens: at most {_STOP_SLOTS}")
    if lengths.max() + sampling.max_tokens > context:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and max_tokens={sampling.max_tokens} exceed the "
            f"model's context of {context}; shorten the prompt or lower max_tokens"
        )
