"""The dtype that matrix products run in, and the precision to ask for."""

from typing import Literal

import jax
import jax.numpy as jnp

ComputeDtype = Literal["float32", "bfloat16"]


def compute_dtype(choice: Literal["auto"] | ComputeDtype, platform: str) -> ComputeDtype:
    """What "auto" means on a `jax.Device.platform`; any other choice is kept.

    bfloat16 on TPU and GPU, whose matrix units are made for it; float32 on CPU, which gains nothing
    by it.
    """
    if choice != "auto":
        return choice
    return "float32" if platform == "cpu" else "bfloat16"


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 means float32: without this GPUs and TPUs multiply float32 with fewer bits.

    The sampler and the trainer must ask for the same, or their log-probs differ.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
