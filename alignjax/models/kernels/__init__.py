"""Queries, keys, values and segments -> attention: one signature, one module for each way to it."""

from alignjax.models.kernels.chunked import RESIDUALS
from alignjax.models.kernels.dispatch import Implementation, attend, choose
from alignjax.models.kernels.einsum import visible

__all__ = ["RESIDUALS", "Implementation", "attend", "choose", "visible"]
