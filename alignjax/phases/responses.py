"""Prompts of a file, in order -> completions of each, and their scores: what data phases sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Sampling
from alignjax.data import (
    Example,
    Examples,
    Prompt,
    Source,
    TextOptions,
    examples,
    open_source,
    prompt_encoder,
)
from alignjax.generate import make_generate
from alignjax.models import load, load_eos_ids
from alignjax.phases.sample_config import ResponsesConfig
from alignjax.phases.scoring import Rewards
from alignjax.rewards.combine import RewardConfig, too_many_failures
from alignjax.rewards.rollout import Rollouts, Task, no_scores, rollout
from alignjax.text import check_fits, load_tokenizer, stop_ids

Position = dict[str, Any]
"""JSON: where the next prompts begin."""


class Drawn(NamedTuple):
    """The next prompts, with their completions."""

    prompts: list[Prompt]
    rollouts: Rollouts
    """Without rewards no completion has a score."""
    position: Position
    """After these prompts."""
    num_dropped: int
    """Prompts left out so far as too long."""


class Responses:
    """What a model answers to the prompts of a config, batch by batch.

    Attributes:
      rewards: what scores the answers, or None.
      num_samples: answers to each prompt.
    """

    def __init__(
        self,
        config: ResponsesConfig,
        mesh: Mesh,
        rewards: RewardConfig | None,
        *,
        view: Callable[[Examples], Source] = lambda found: found,
    ):
        """Args:
          rewards: what scores the answers; None: nothing.
          view: which of the examples are gone through.
        Raises:
          UserError: if prompt and completion exceed the model's context, the tokenizer does not fit
            the model, and what `Rewards` raises.
        """
        self._config = config
        limits, where = config.rollout, config.tokenizer or config.model.path
        dtype = compute_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
        model, self._params = load(config.model.path, mesh=mesh, compute_dtype=dtype)
        self._tokenizer = load_tokenizer(where)
        check_fits(self._tokenizer, model.config.vocab_size, where)
        most = limits.max_prompt_tokens + limits.max_tokens
        context = model.config.max_position_embeddings
        if most > context:
            raise UserError(
                f"rollout.max_prompt_tokens={limits.max_prompt_tokens} and max_tokens="
                f"{limits.max_tokens} exceed the model's context of {context} tokens; lower one"
            )
        source = view(Examples(open_source(config.data.train), config.data.text.fields))
        self._limit = config.data.num_prompts or len(source)
        self._prompts = examples(
            source,
            prompt_encoder(config.data.text, self._tokenizer),
            num_prompts=limits.num_prompts,
            prompt_len=limits.max_prompt_tokens,
            overlong=config.data.overlong,
            shuffle=False,
            num_epochs=1,
        )
        self._sampling = Sampling(
            temperature=limits.temperature,
            top_k=limits.top_k,
            top_p=limits.top_p,
            min_p=limits.min_p,
            repetition_penalty=limits.repetition_penalty,
            max_tokens=limits.max_tokens,
            stop_tokens=stop_ids(
                self._tokenizer, limits.stop_tokens, load_eos_ids(config.model.path)
            ),
            num_samples=limits.num_samples,
        )
        self.num_samples = limits.num_samples
        self._generate = make_generate(
            model, mesh=mesh, max_rows=limits.max_rows,
            int8_kv=limits.int8_kv, int8_weights=limits.int8_weights,
        )  # fmt: skip
        self.rewards: Rewards | None = None
        if rewards is not None:
            log_path = Path(config.output_dir) / config.name / "rewards.log"
            self.rewards = Rewards(
                rewards, self._tokenizer, mesh, max_tokens=most, log_path=log_path
            )

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user."""
        return [] if self.rewards is None else self.rewards.warnings

    @property
    def start(self) -> Position:
        """Where the first prompts begin."""
        return self._prompts.get_state()

    def draw(self, position: Position, num_done: int) -> Drawn | None:
        """The prompts from `position` on and what the model answers; None at the end.

        Args:
          num_done: prompts before them. What is sampled is a function of it and of the seed.
        Raises:
          UserError: if more rewards failed than `rewards.max_failure_frac` allows.
        """
        left = self._limit - num_done
        self._prompts.set_state(position)
        prompts = next(self._prompts, [])[:left] if left > 0 else []
        if not prompts:
            return None
        tasks = [Task(p.tokens, p.example.reference, p.example.fields) for p in prompts]
        key = named_key(jax.random.key(self._config.seed), "sample", num_done)
        out = rollout(
            self._generate, self.rewards or no_scores, self._tokenizer, self._params, tasks, key,
            self._sampling, prompt_len=self._config.rollout.max_prompt_tokens,
        )  # fmt: skip
        if self.rewards is not None:
            reason = too_many_failures(out.scores, self.rewards.config.max_failure_frac)
            if reason is not None:
                raise UserError(reason)
        return Drawn(prompts, out, self._prompts.get_state(), self._prompts.num_dropped)

    def close(self) -> None:
        if self.rewards is not None:
            self.rewards.close()

    def written(self, example: Example) -> str | list[dict[str, Any]]:
        """A prompt as records have it: text or messages (`prompts_as`)."""
        return written_prompt(example, self._config.data.text, self._config.prompts_as)


def written_prompt(
    example: Example, text: TextOptions, way: Literal["seen", "text", "messages"] = "seen"
) -> str | list[dict[str, Any]]:
    """The prompt of an example as text or as messages; `way` as `prompts_as` of a config."""
    if example.messages is not None:
        messages = list(example.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    prompt = example.prompt or ""
    if way == "text" or (way == "seen" and not text.chat):
        return prompt
    system = [{"role": "system", "content": text.system}] if text.system is not None else []
    return [*system, {"role": "user", "content": prompt}]


def demonstration(prompt: str | list[dict[str, Any]], response: str) -> dict[str, Any]:
    """What `phase: sft` reads: `prompt` and `completion`, or `messages`."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": response}
    return {"messages": [*prompt, {"role": "assistant", "content": response}]}
