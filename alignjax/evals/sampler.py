"""A model's directory -> completions of prompts, scored: what all evaluations by sampling share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import Field, JsonValue

from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Sample, Sampling, ScoreFn
from alignjax.data import TextConfig
from alignjax.evals.arithmetic import Arithmetic
from alignjax.generate import make_generate, make_sequence_logps
from alignjax.models import load, load_eos_ids
from alignjax.rewards.combine import RewardConfig
from alignjax.rewards.rollout import Rollouts, Task, no_scores, rollout
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import HFTokenizer, check_fits, load_tokenizer, stop_ids

_SHORTEST_ROW = 64

MakeRewards = Callable[[RewardConfig, HFTokenizer, Mesh], AbstractContextManager[ScoreFn]]
"""What makes a ScoreFn of a config, the policy's tokenizer and the devices of reward models."""


class SamplingConfig(Config):
    """Which prompts, and how they are sampled."""

    data: str | list[str] | Arithmetic
    """Records, as of data.train of sft; or `{generate: arithmetic}`, problems that are made."""
    text: TextConfig
    shots: list[dict[str, JsonValue]] = []
    """Worked examples that stand before each problem: records with the keys that text.fields reads
    for a prompt and a completion."""
    shot_separator: str = "\n\n"
    """Between them, where the prompt is plain text."""
    num_problems: int | None = Field(None, ge=1)
    """The first so many records; all if not given."""
    num_samples: int = Field(8, ge=1)
    """Samples of each problem (n)."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_prompt_tokens: int = Field(256, ge=1)
    overlong: Literal["error", "drop"] = "error"
    """What to do with a longer prompt; `drop` leaves the problem out, so look at num_problems."""
    max_tokens: int = Field(256, ge=1)
    stop_tokens: list[str] = []
    """Tokens that end a completion, besides EOS and what the model's directory lists as such."""
    until: list[Annotated[str, Field(min_length=1)]] = []
    """Texts at which a completion is cut before it is judged, such as "Question:": base models go
    on with a problem of their own. Reward models read it whole."""
    max_rows: int = Field(1024, ge=1)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    seed: int = Field(0, ge=0)


class Sampler:
    """A model that is there to be sampled from."""

    def __init__(self, path: str, config: SamplingConfig, tokenizer: str | None = None):
        """Args:
          path: a Hugging Face directory, or an id of the Hub.
          tokenizer: likewise; the model's own if not given.
        Raises:
          UserError: if either cannot be read.
        """
        self.path, self._config = path, config
        self.mesh = make_mesh(MeshConfig())
        dtype = compute_dtype(config.compute_dtype, self.mesh.devices.flat[0].platform)
        self._model, self._params = load(path, mesh=self.mesh, compute_dtype=dtype)
        self.tokenizer = load_tokenizer(tokenizer or path)
        check_fits(self.tokenizer, self._model.config.vocab_size, tokenizer or path)

    def sample(self, tasks: Sequence[Task], score: ScoreFn) -> Rollouts:
        """n completions of each prompt, the same ones each time, cut at `until`.

        Raises:
          UserError: if a prompt and max_tokens exceed the model's context.
        """
        config = self._config
        longest = max(len(task.tokens) for task in tasks)
        context = self._model.config.max_position_embeddings
        if longest + config.max_tokens > context:
            raise UserError(
                f"{self.path}: a prompt of {longest} tokens and max_tokens={config.max_tokens} "
                f"exceed the model's context of {context}; lower max_tokens"
            )
        sampling = Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            stop_tokens=stop_ids(self.tokenizer, config.stop_tokens, load_eos_ids(self.path)),
            num_samples=config.num_samples,
        )
        out = rollout(
            make_generate(self._model, mesh=self.mesh, max_rows=config.max_rows),
            no_scores,
            self.tokenizer,
            self._params,
            tasks,
            jax.random.PRNGKey(config.seed),
            sampling,
            prompt_len=config.max_prompt_tokens,
        )
        samples = [_cut(sample, config.until) for sample in out.samples]
        return dataclasses.replace(out, samples=samples, scores=score(samples))

    def logps(self, texts: list[np.ndarray], num_targets: np.ndarray) -> np.ndarray:
        """[N] float64, nats: the log-prob of the last `num_targets` tokens of each text, at
        temperature 1.

        Raises:
          UserError: if a text exceeds the model's context, or a log-prob is not finite.
        """
        longest = max(map(len, texts))
        context = self._model.config.max_position_embeddings
        if longest > context:
            raise UserError(
                f"{self.path}: a prompt and what follows have {longest} tokens, more than the "
                f"model's context of {context}; lower max_prompt_tokens, and leave out longer "
                "prompts (overlong: drop)"
            )
        row_len = _SHORTEST_ROW
        while row_len < longest:
            row_len *= 2
        logps = make_sequence_logps(
            self._model, self.mesh, row_len=min(row_len, context), temperature=1.0
        )
        found = logps(self._params, texts, num_targets)
        if not np.isfinite(found).all():
            raise UserError(
                f"{self.path}: a log-prob is not finite: the weights hold nan or inf, or are too "
                f"large for compute_dtype={self._config.compute_dtype}"
            )
        return found


def _cut(sample: Sample, until: Sequence[str]) -> Sample:
    starts = [at for text in until if (at := sample.completion.find(text)) >= 0]
    if not starts:
        return sample
    return dataclasses.replace(sample, completion=sample.completion[: min(starts)])
