"""What can be set of the phase in which a judge labels responses."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config, DirectoryName
from alignjax.phases.sample_config import ResponsesSource
from alignjax.rewards.constitution import ConstitutionConfig
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.sharding import MeshConfig


class SampledConfig(ResponsesSource):
    """What is sampled to be judged."""

    truncated: Literal["keep", "drop"] = "keep"
    """As of `phase: sample`."""


class LabelConfig(Config):
    """`phase: label`."""

    phase: Literal["label"]
    name: DirectoryName
    """The run's directory is output_dir/name."""
    output_dir: str = "runs"
    seed: int = Field(0, ge=0)
    mesh: MeshConfig = MeshConfig()
    responses: str | list[str] | None = None
    """Records of prompts with responses, such as preferences.jsonl of `phase: sample` or an export
    of the labelling page. What they say of the responses is not shown to the judge."""
    num_prompts: int = Field(32, ge=1)
    """Of `responses`: prompts that are judged together; after each such batch the run can be
    continued. Of `sample` it is rollout.num_prompts."""
    sample: SampledConfig | None = None
    """Or what they are sampled from, as for `phase: sample`."""
    judge: JudgeConfig
    method: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: the judge compares every two responses of a prompt, and each has a rank by its mean
    probability of being the better one (`win_rates`). pointwise: each response has a score."""
    constitution: ConstitutionConfig | None = None
    """Of pairwise: each prompt draws a principle, whose comparison is the question to the judge."""
    compare_with: str | list[str] | None = None
    """Judgements by others on the same responses, with whom the judge's agreement is measured;
    those in `responses` if not given."""
    max_failure_frac: float = Field(0.0, ge=0, le=1)
    """The share of a batch's questions without an answer above which the run stops, to be continued
    when the judge answers again; below it, they are left out."""
    max_unparsable_frac: float = Field(0.2, ge=0, le=1)
    """The same of those whose answers cannot be understood."""

    @model_validator(mode="after")
    def _has_responses(self) -> Self:
        if (self.responses is None) == (self.sample is None):
            raise ValueError(
                "give either responses (a file) or sample (a model and prompts): what is judged"
            )
        return self

    @model_validator(mode="after")
    def _has_one_question(self) -> Self:
        if self.constitution is None:
            return self
        if self.method != "pairwise":
            raise ValueError("a constitution compares two responses: it goes with method: pairwise")
        if self.judge.question is not None:
            raise ValueError(
                "judge.question and constitution both say what is asked: give one of them"
            )
        return self
