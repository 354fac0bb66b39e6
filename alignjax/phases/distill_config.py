"""What can be set of distillation on given texts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignjax.phases.corpus import CorpusConfig
from alignjax.phases.teacher import DivergenceConfig, TeacherConfig


class CachedTeacherConfig(TeacherConfig):
    """What is learned from, in each step or once."""

    top_k: int | None = Field(None, ge=1)
    """Ask the teacher once, before the first step, for its so many most likely tokens at each
    target, and keep them on disk: it then takes no time and no memory in training. All others count
    as one. null: the teacher reads each batch, and whole distributions are compared."""
    cache_dir: str | None = None
    """Where they are kept, by their content; null: in the user's cache."""

    @model_validator(mode="after")
    def _is_cached(self) -> Self:
        if self.cache_dir is not None and self.top_k is None:
            raise ValueError(
                f"cache_dir={self.cache_dir!r}: only with top_k is anything kept on disk; give "
                "top_k as well, or leave cache_dir out"
            )
        return self


class DistillConfig(CorpusConfig):
    """`phase: distill`."""

    phase: Literal["distill"]
    teacher: CachedTeacherConfig
    divergence: DivergenceConfig = DivergenceConfig()

    @model_validator(mode="after")
    def _is_forward(self) -> Self:
        if self.teacher.top_k is not None and self.divergence.kind != "forward_kl":
            raise ValueError(
                f"divergence.kind={self.divergence.kind} with teacher.top_k={self.teacher.top_k}: "
                "of the tokens beyond them only the sum is known, which is enough for forward_kl "
                "alone; take that, or leave top_k out"
            )
        return self
