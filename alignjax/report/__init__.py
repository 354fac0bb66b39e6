"""Metrics and transcripts -> pictures. Imports no jax, and matplotlib without a display."""

from alignjax.report.frontier import Frontier, frontier_of, frontier_picture
from alignjax.report.reasoning import Curve, Transcript, reasoning_picture
from alignjax.report.stages import stages_picture
from alignjax.report.training import training_report

__all__ = [
    "Curve",
    "Frontier",
    "Transcript",
    "frontier_of",
    "frontier_picture",
    "reasoning_picture",
    "stages_picture",
    "training_report",
]
