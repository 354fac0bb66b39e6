"""Which precision a matrix product asks for."""

import jax.numpy as jnp
import pytest
from jax.lax import Precision

from alignjax.core.precision import matmul_precision


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (jnp.float32, Precision.HIGHEST),
        (jnp.bfloat16, Precision.DEFAULT),
        (jnp.float16, Precision.DEFAULT),
    ],
)
def test_float32_means_float32(dtype, precision):
    assert matmul_precision(jnp.dtype(dtype)) == precision
