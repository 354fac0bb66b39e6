"""What can be set of the phase that has a model criticise and revise its own answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignjax.core.config import Config, DirectoryName
from alignjax.phases.sample_config import SampleData, SampledModel
from alignjax.rewards.constitution import ConstitutionConfig
from alignjax.sharding import MeshConfig


class StepSampling(Config):
    """How the text of one step is sampled."""

    max_tokens: int = Field(256, ge=1)
    """Limit on its tokens, EOS included."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


class CritiqueRollout(Config):
    """How answers, critiques and revisions are sampled."""

    num_samples: int = Field(1, ge=1)
    """Answers to each prompt, each with critiques and revisions of its own."""
    num_prompts: int = Field(32, ge=1)
    """Prompts that go through all rounds together; after each such batch the run can be
    continued."""
    max_prompt_tokens: int = Field(256, ge=1)
    response: StepSampling = StepSampling()
    """Of the first answers."""
    critique: StepSampling = StepSampling()
    revision: StepSampling = StepSampling()
    stop_tokens: list[str] = []
    """Tokens that end any of them, besides EOS and what the model's directory lists as such."""
    max_rows: int = Field(1024, ge=1)
    """Texts that are sampled at once, at most."""


class CritiqueConfig(Config):
    """`phase: critique`."""

    phase: Literal["critique"]
    name: DirectoryName
    """The run's directory is output_dir/name."""
    output_dir: str = "runs"
    seed: int = Field(0, ge=0)
    """Of what is sampled and of which principles are drawn."""
    model: SampledModel
    tokenizer: str | None = None
    """A directory with a tokenizer, or an id of the Hub; the model's own if not given."""
    mesh: MeshConfig = MeshConfig()
    data: SampleData
    constitution: ConstitutionConfig = ConstitutionConfig()
    template: str
    """What the model reads before a critique and a revision: a YAML file, or one that ships with
    the package: critique_chat, revision_chat (without critiques), critique_text (plain text with
    control tokens)."""
    num_rounds: int = Field(4, ge=1)
    """Critiques and revisions of each answer; each round draws a principle that the answer has not
    had yet."""
    rollout: CritiqueRollout = CritiqueRollout()
    truncated: Literal["discard", "keep"] = "discard"
    """What to do with a text that its max_tokens cut. discard: as with an empty one, which is never
    taken, a first answer is left out with its prompt; of a round nothing is taken, and the answer
    stays as it was before."""
