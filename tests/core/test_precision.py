"""Which precision a matrix product asks for."""

import jax.numpy as jnp
import pytest
from jax.lax import Precision

from alignjax.core.precision import compute_dtype, matmul_precision


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


@pytest.mark.parametrize(
    ("choice", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "tpu", "float32"),
    ],
)
def test_matrix_units_get_bfloat16_unless_told_otherwise(choice, platform, expected):
    assert compute_dtype(choice, platform) == expected
