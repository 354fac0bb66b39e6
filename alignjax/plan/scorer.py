"""What scores samples on devices, to be planned: a reward model, or a judge that is a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from alignjax.core.types import Params
from alignjax.plan.programs import Program


class Samples(NamedTuple):
    """What is scored: completions of prompts, all as long as they may be, in tokens."""

    num_prompts: int
    num_samples: int
    """Of each prompt."""
    prompt_len: int
    completion_len: int

    @classmethod
    def of(cls, limits: Any, num_samples: int) -> Samples:
        """Args: limits: the `rollout` of a config."""
        return cls(limits.num_prompts, num_samples, limits.max_prompt_tokens, limits.max_tokens)

    @property
    def total(self) -> int:
        return self.num_prompts * self.num_samples

    @property
    def longest(self) -> int:
        return self.prompt_len + self.completion_len


@dataclass(frozen=True)
class Scorer:
    """One of them.

    Attributes:
      role: of its parameters, and the name of its programs.
      programs: by role what lies on its devices, the samples -> what it compiles to score them.
      notes: what was taken for granted, in sentences.
    """

    role: str
    params: Params
    programs: Callable[[Mapping[str, Any], Samples], list[Program]]
    notes: tuple[str, ...] = ()
