"""Prompts -> completions with their scores. Generation and scoring arrive as functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignjax.core.types import (
    LENGTH,
    Completions,
    GenerateFn,
    Params,
    Sample,
    Sampling,
    Score,
    ScoreFn,
    Tokenizer,
)
from alignjax.rewards.plain import to_json

if TYPE_CHECKING:
    from jax import Array


@dataclass(frozen=True)
class Task:
    """One prompt and what its completions are compared with."""

    tokens: np.ndarray
    """[length] int32; the ids that generation starts from."""
    reference: Any = None
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Rollouts:
    """G completions of each of N prompts: everything that training and evaluation need of them."""

    tasks: Sequence[Task]
    completions: Completions
    samples: list[Sample]
    scores: list[Score]
    version: int | None = None
    """Iterations of training that the weights had seen which sampled all of these tokens; None
    where nobody has said."""

    @property
    def rewards(self) -> np.ndarray:
        """[N, G] float32; nan where the reward failed."""
        values = [np.nan if score.value is None else score.value for score in self.scores]
        return np.array(values, np.float32).reshape(len(self.tasks), -1)

    @property
    def is_truncated(self) -> np.ndarray:
        """[N * G] bool; ended by the limit on tokens."""
        return self.completions.finish_reasons == LENGTH

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, prompts included."""
        group = len(self.samples) // len(self.tasks)
        prompts = group * sum(len(task.tokens) for task in self.tasks)
        return prompts + int(self.completions.lengths.sum())

    def token_ids(self) -> list[np.ndarray]:
        """[length] int32 of each sample: its prompt, and what was sampled after it."""
        out, group = self.completions, len(self.samples) // len(self.tasks)
        return [
            np.concatenate([self.tasks[i // group].tokens, ids[:length]]).astype(np.int32)
            for i, (ids, length) in enumerate(zip(out.tokens, out.lengths, strict=True))
        ]

    def part(self, name: str) -> np.ndarray:
        """[N, G] float32; one part of the reward, such as accuracy; nan where it is missing."""
        values = [score.parts.get(name, np.nan) for score in self.scores]
        return np.array(values, np.float32).reshape(len(self.tasks), -1)

    @property
    def part_names(self) -> list[str]:
        """The parts that any sample has, in the order of first appearance."""
        return list(dict.fromkeys(name for score in self.scores for name in score.parts))

    def by_task(self) -> list[Rollouts]:
        """Those of each prompt by itself."""
        n = len(self.samples) // len(self.tasks)
        rows = [slice(i * n, (i + 1) * n) for i in range(len(self.tasks))]
        return [
            Rollouts(
                [task],
                Completions(*(values[part] for values in self.completions)),
                self.samples[part],
                self.scores[part],
            )
            for task, part in zip(self.tasks, rows, strict=True)
        ]

    def records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows as JSON values, to be read by people."""
        return [
            {
                "prompt": self.samples[i].prompt,
                "completion": self.samples[i].completion,
                "reference": _as_json(self.samples[i].reference),
                "reward": self.scores[i].value,
                "parts": dict(self.scores[i].parts),
                "num_tokens": self.samples[i].num_tokens,
                "is_truncated": self.samples[i].is_truncated,
                "error": self.scores[i].error,
            }
            for i in indices
        ]


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Of at least one, all with as many completions of each prompt; the inverse of `by_task`."""
    return Rollouts(
        [task for part in parts for task in part.tasks],
        Completions(*map(np.concatenate, zip(*(p.completions for p in parts), strict=True))),
        [sample for part in parts for sample in part.samples],
        [score for part in parts for score in part.scores],
    )


def no_scores(samples: Sequence[Sample]) -> list[Score]:
    """A `ScoreFn` that judges nothing: no sample has a score."""
    return [Score(None)] * len(samples)


def rollout(
    generate: GenerateFn,
    score: ScoreFn,
    tokenizer: Tokenizer,
    params: Params,
    tasks: Sequence[Task],
    key: Array,
    sampling: Sampling,
    *,
    prompt_len: int,
) -> Rollouts:
    """Samples G completions of each task and scores them.

    Args:
      generate, score: what samples and what scores.
      tokenizer: turns ids into the text that is scored; special tokens are left out of completions.
      params: weights to sample from.
      tasks: N prompts.
      key: PRNG key of this round.
      sampling: `num_samples` is G.
      prompt_len: width that prompts are padded to; a fixed one avoids recompilation.
    """
    prompts, lengths = padded(tasks, prompt_len)
    out = generate(params, prompts, lengths, key, sampling)
    texts = [tokenizer.decode(task.tokens) for task in tasks]
    samples = [
        sample_of(
            tasks[i // sampling.num_samples], texts[i // sampling.num_samples], ids[:length],
            tokenizer, is_truncated=bool(reason == LENGTH),
        )
        for i, (ids, length, reason) in enumerate(
            zip(out.tokens, out.lengths, out.finish_reasons, strict=True)
        )
    ]  # fmt: skip
    return Rollouts(tasks, out, samples, score(samples))


def padded(tasks: Sequence[Task], prompt_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts [N, prompt_len] int32, padded on the right, and their lengths [N] int32."""
    prompts = np.zeros((len(tasks), prompt_len), np.int32)
    for row, task in zip(prompts, tasks, strict=True):
        row[: len(task.tokens)] = task.tokens
    return prompts, np.array([len(task.tokens) for task in tasks], np.int32)


def sample_of(
    task: Task, prompt: str, ids: np.ndarray, tokenizer: Tokenizer, *, is_truncated: bool
) -> Sample:
    """A completion [length] int32 of a task, whose prompt reads `prompt`, as rewards see it."""
    return Sample(
        prompt=prompt,
        completion=tokenizer.decode(ids),
        reference=task.reference,
        fields=task.fields or {},
        num_tokens=len(ids),
        is_truncated=is_truncated,
        prompt_ids=task.tokens,
        completion_ids=ids,
    )


def _as_json(value: Any) -> Any:
    """A JSON value of it; what has none failed its sample, and is shown as Python writes it."""
    try:
        return json.loads(to_json(value))
    except (TypeError, ValueError, RecursionError):
        return repr(value)[:80]
