"""The dtype of a matrix product -> the precision to ask for."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Float32 means float32: without this GPUs and TPUs multiply float32 with fewer bits.

    The sampler and the trainer must ask for the same, or their log-probs differ.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
