"""A model -> a GenerateFn: keeps slots filled with rows until all of them are done."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from alignjax.core.types import Completions, Params, Sampling
from alignjax.generate.call import Call, OnTokens
from alignjax.generate.limits import check
from alignjax.generate.schedule import Ladder, bucket
from alignjax.models import Model, lora
from alignjax.sharding.mesh import BATCH_AXES

_fold = jax.jit(jax.vmap(jax.random.fold_in))


def _row_keys(
    key: Array, num_prompts: int, num_samples: int, seeds: np.ndarray | None
) -> np.ndarray:
    """[B * G, 2] uint32: the key of each row."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    total = num_prompts * num_samples
    numbers = np.arange(bucket(total), dtype=np.uint32)
    keys = jnp.broadcast_to(key, (len(numbers), *key.shape))
    if seeds is not None:
        each = np.zeros(len(numbers), np.uint32)
        each[:total] = np.repeat(seeds, num_samples)
        keys, numbers = _fold(keys, each), numbers % num_samples
    return np.asarray(_fold(keys, numbers))[:total]


class Engine:
    """Implements `core.types.GenerateFn` for one model.

    As many rows as `max_rows` allows are computed at once. Each has a slot, which the next row in
    the queue takes when it is done; as the queue runs out, the rows that are left move together.
    The keys and values of a prompt are computed once and serve all its samples; those of what was
    sampled lie in a store that grows with the longest row. A row's samples depend on its key alone.

    Compiled functions are shared by all engines of a model. Their shapes are those of a `Ladder`,
    which follows from the size of a call: the width of the array of prompts counts, not the longest
    prompt in it, so that a caller that fixes its width never recompiles.
    """

    def __init__(
        self,
        model: Model,
        *,
        mesh: jax.sharding.Mesh | None = None,
        max_rows: int = 1024,
        int8_kv: bool = False,
        int8_weights: bool = False,
    ):
        """See `make_generate`."""
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: expected at least 1")
        self.model, self._quantize = model, None
        if int8_weights and model.quantize is None:
            self.model = dataclasses.replace(model, quantize="int8")
            self._quantize = jax.jit(functools.partial(lora.quantize_base, self.model))
        self.mesh = mesh
        self.max_rows = max_rows
        self.int8_kv = int8_kv

    def __call__(
        self,
        params: Params,
        prompts: np.ndarray,
        lengths: np.ndarray,
        key: Array,
        sampling: Sampling,
        *,
        max_tokens: np.ndarray | None = None,
        seeds: np.ndarray | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Completions:
        """See `core.types.GenerateFn`.

        Args:
          max_tokens: [B] int; a limit for each prompt, which that of `sampling` limits too.
          seeds: [B] int >= 0; a prompt's samples depend on the key and on its seed; by default on
            the key and on the number of the prompt in the call.
          on_tokens: see `OnTokens`; called every few tokens.
        Raises:
          ValueError: on settings that make no sense.
        """
        prompts, lengths = np.asarray(prompts, np.int32), np.asarray(lengths, np.int32)
        check(prompts, lengths, sampling, self.model.config)
        limits = np.full(len(prompts), sampling.max_tokens, np.int32)
        if max_tokens is not None:
            limits = np.minimum(limits, max_tokens)
        for name, values, least in (("max_tokens", limits, 1), ("seeds", seeds, 0)):
            if values is not None and (len(values) != len(prompts) or np.min(values) < least):
                raise ValueError(
                    f"{name} {values}: expected {len(prompts)} numbers of at least {least}, one "
                    "for each prompt"
                )
        if self._quantize is not None:  # Anew in each call: it samples from what was trained last.
            params = self._quantize(params)
        ladder = Ladder.of(
            len(prompts), prompts.shape[1], sampling.num_samples, sampling.max_tokens,
            max_rows=self.max_rows, num_devices=self.num_devices,
        )  # fmt: skip
        call = Call(
            self.model, self.mesh, params, prompts, lengths, sampling, ladder,
            int8_kv=self.int8_kv,
        )  # fmt: skip
        return call.run(
            _row_keys(key, len(prompts), sampling.num_samples, seeds), limits, on_tokens
        )

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)


def make_generate(
    model: Model,
    *,
    mesh: jax.sharding.Mesh | None = None,
    max_rows: int = 1024,
    int8_kv: bool = False,
    int8_weights: bool = False,
) -> Engine:
    """The engine for a model.

    Args:
      mesh: rows and prompts are split over its data and fsdp axes.
      max_rows: the most rows computed at once, but at least one on each device.
      int8_kv: keys and values are kept as codes, each head of each token with a scale of its own;
        for memory: each is within 1/254 of the largest of its head.
      int8_weights: the kernels of the layers become codes in each call, whatever holds them
        otherwise; adapters stay as they are. What is sampled is then of a slightly other model than
        the one that is trained, and so are its log-probs.
    """
    return Engine(model, mesh=mesh, max_rows=max_rows, int8_kv=int8_kv, int8_weights=int8_weights)
