"""A model -> a GenerateFn: pads calls to a ladder of shapes, compiles once for each, runs them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.core.types import LENGTH, STOP, Completions, Params, Sampling
from alignjax.generate.decode import Limits, decode
from alignjax.models import Model, ModelConfig
from alignjax.sharding import put_batch
from alignjax.sharding.mesh import BATCH_AXES

_STOP_SLOTS = 16
_MIN_ROWS = 8  # So that all small calls are one compilation.


def bucket(size: int, *, smallest: int = 8) -> int:
    """The lowest rung of the ladder 1, 2, 3, 4, 6, 8, 12, ... that holds `size` and `smallest`."""
    rung = 1
    while rung < max(size, smallest):
        rung = -(-rung * 3 // 2) if rung & (rung - 1) == 0 else rung // 3 * 4
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
        """Args: mesh: prompts are sharded over its data and fsdp axes; max_rows: the most rows of
        tokens computed at once, but at least one on each device; more completions are sampled in
        turns, with the same result."""
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
        config = self.model.config
        _check(prompts, lengths, sampling, config)
        limits = Limits(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(min(sampling.top_k, config.vocab_size)),
            top_p=jnp.float32(sampling.top_p),
            max_tokens=jnp.int32(sampling.max_tokens),
            stop_tokens=jnp.array(
                [*sampling.stop_tokens, *[-1] * (_STOP_SLOTS - len(sampling.stop_tokens))],
                jnp.int32,
            ),
        )
        per_prompt, per_turn = self._split(len(prompts), sampling.num_samples)
        # Sample g of prompt i is row i * G + g either way, and the row decides its key.
        copies = sampling.num_samples // per_prompt
        prompts, lengths = np.repeat(prompts, copies, axis=0), np.repeat(lengths, copies)
        sampling = dataclasses.replace(sampling, num_samples=per_prompt)
        turns = [
            self._turn(params, prompts[i : i + per_turn], lengths[i : i + per_turn], key, limits,
                       sampling, first_row=i * per_prompt, most=per_turn)
            for i in range(0, len(prompts), per_turn)
        ]  # fmt: skip
        tokens, logps, counts, is_stopped = (
            np.concatenate(parts) for parts in zip(*turns, strict=True)
        )
        reasons = np.where(is_stopped, STOP, LENGTH).astype(np.int8)
        return Completions(tokens, counts, logps, reasons)

    @property
    def _num_devices(self) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def _split(self, num_prompts: int, num_samples: int) -> tuple[int, int]:
        """How many samples of a prompt are computed together, and how many prompts in a turn.

        All samples of it, unless that is more than a device may hold or than its share of the rows:
        then the most that divide them, and the prompt stands in several places.
        """
        limit = max(1, self.max_rows // self._num_devices)
        share = -(-num_prompts * num_samples // self._num_devices)
        divisors = [g for g in range(1, num_samples + 1) if num_samples % g == 0]
        per_prompt = max(g for g in divisors if g <= min(limit, share))
        return per_prompt, limit // per_prompt * self._num_devices

    def _turn(
        self, params: Params, prompts: np.ndarray, lengths: np.ndarray, key: Array, limits: Limits,
        sampling: Sampling, *, first_row: int, most: int,
    ) -> list[np.ndarray]:  # fmt: skip
        num_prompts, width = prompts.shape
        rows = bucket(num_prompts, smallest=_MIN_ROWS // sampling.num_samples)
        rows = min(most, -(-rows // self._num_devices) * self._num_devices)
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


def _check(
    prompts: np.ndarray, lengths: np.ndarray, sampling: Sampling, config: ModelConfig
) -> None:
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or not len(prompts):
        raise ValueError(
            f"prompts {prompts.shape}, lengths {lengths.shape}: expected [B, P] and [B] with B >= 1"
        )
    if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()}: expected 1 to {prompts.shape[1]}, "
            "the width of prompts; an empty prompt needs at least a bos token"
        )
    is_real = np.arange(prompts.shape[1]) < lengths[:, None]
    is_wrong = is_real & ((prompts < 0) | (prompts >= config.vocab_size))
    if is_wrong.any():
        row, column = np.argwhere(is_wrong)[0]
        raise ValueError(
            f"prompts: id {prompts[row, column]} in row {row}, column {column}; the model has ids "
            f"0 to {config.vocab_size - 1}"
        )
    is_temperature = 0 <= sampling.temperature < math.inf  # nan is none
    if not is_temperature or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"{sampling}: expected a finite temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
        )
    if sampling.max_tokens < 1 or sampling.num_samples < 1:
        raise ValueError(f"{sampling}: expected max_tokens and num_samples of at least 1")
    if len(sampling.stop_tokens) > _STOP_SLOTS:
        raise ValueError(f"{len(sampling.stop_tokens)} stop tokens: at most {_STOP_SLOTS}")
    context = config.max_position_embeddings
    if lengths.max() + sampling.max_tokens > context:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and max_tokens={sampling.max_tokens} exceed the "
            f"model's context of {context}; shorten the prompt or lower max_tokens"
        )
