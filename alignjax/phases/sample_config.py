"""What can be set of the phases that sample responses."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config, DirectoryName
from alignjax.data import TextConfig
from alignjax.rewards.combine import RewardConfig
from alignjax.sharding import MeshConfig


class SampledModel(Config):
    """What is sampled from."""

    path: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""


class SampleData(Config):
    """The prompts."""

    train: str | list[str]
    """As for sft; each record is gone through once, in order."""
    text: TextConfig
    overlong: Literal["error", "drop"] = "error"
    """What to do with a prompt longer than rollout.max_prompt_tokens. It is never cut."""
    num_prompts: int | None = Field(None, ge=1)
    """The first so many; all if not given."""


class SampleRollout(Config):
    """How completions are sampled."""

    num_samples: int = Field(4, ge=1)
    """Completions of each prompt (K)."""
    num_prompts: int = Field(32, ge=1)
    """Prompts that are sampled together; after each such batch the run can be continued."""
    max_prompt_tokens: int = Field(256, ge=1)
    max_tokens: int = Field(256, ge=1)
    """Limit on the tokens of a completion, EOS included."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    """Leaves out what is less likely than this share of the most likely token."""
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Above 1 against tokens of the prompt and of the completion so far (arXiv:1909.05858)."""
    stop_tokens: list[str] = []
    """Tokens that end a completion, besides EOS and what the model's directory lists as such."""
    max_rows: int = Field(1024, ge=1)
    """Completions that are sampled at once, at most."""
    int8_kv: bool = False
    """Keeps keys and values as int8 codes, to save memory."""
    int8_weights: bool = False
    """Keeps the kernels of the layers as int8 codes, to save memory."""


class ResponsesSource(Config):
    """What is sampled, from what."""

    model: SampledModel
    tokenizer: str | None = None
    """A directory with a tokenizer, or an id of the Hub; the model's own if not given."""
    data: SampleData
    rollout: SampleRollout = SampleRollout()
    prompts_as: Literal["seen", "text", "messages"] = "seen"
    """How a prompt is written down: as the model has seen it, that is as messages where it went
    through a chat template and as text elsewhere; or always as the one or the other."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.prompts_as == "text" and self.data.text.fields.prompt is None:
            raise ValueError(
                "prompts_as='text' needs data.text.fields.prompt; these prompts are messages: "
                "leave it out"
            )
        return self


class ResponsesConfig(ResponsesSource):
    """What the configs of data phases share that sample from a model."""

    name: DirectoryName
    """The run's directory is output_dir/name."""
    output_dir: str = "runs"
    seed: int = Field(0, ge=0)
    mesh: MeshConfig = MeshConfig()


class SampleConfig(ResponsesConfig):
    """`phase: sample`."""

    phase: Literal["sample"]
    rewards: RewardConfig | None = None
    """What judges them, as `scores`; null: nothing, as for people to label."""
    truncated: Literal["keep", "drop"] = "keep"
    """What to do with a completion that max_tokens cut. As a response it would be taken for one
    that ends there."""
