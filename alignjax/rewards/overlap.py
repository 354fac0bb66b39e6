"""As `rollout`, but completions are scored while others are still being sampled.

Rewards run in processes of their own, which leaves the devices to the sampler: a thread here waits
for them, and takes what has been completed meanwhile each time they are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from alignjax.core.types import (
    Completions,
    Params,
    Sample,
    Sampling,
    Score,
    ScoreFn,
    Tokenizer,
)
from alignjax.rewards.rollout import Rollouts, Task, padded, sample_of

if TYPE_CHECKING:
    from jax import Array


class Seen(Protocol):
    """What has been sampled since the last look."""

    @property
    def tokens(self) -> Mapping[int, np.ndarray]:
        """Row i * G + g -> its new tokens [n] int32."""
        ...


class WatchedGenerateFn(Protocol):
    """A `GenerateFn` that says from time to time what has been sampled, as `generate.Engine`."""

    def __call__(
        self, params: Params, prompts: np.ndarray, lengths: np.ndarray, key: Array,
        sampling: Sampling, *, on_tokens: Any,
    ) -> Completions:  # fmt: skip
        """Args: on_tokens: called with a `Seen`."""
        ...


def overlapped_rollout(
    generate: WatchedGenerateFn,
    score: ScoreFn,
    tokenizer: Tokenizer,
    params: Params,
    tasks: Sequence[Task],
    key: Array,
    sampling: Sampling,
    *,
    prompt_len: int,
) -> Rollouts:
    """Arguments and result as of `rewards.rollout.rollout`.

    Args:
      score: gives each sample the score that it gives it among any others. Called in a thread, with
        some of the samples at a time.
    Raises:
      ValueError: on stop sequences, of which the end of a completion is not known here.
      Exception: what `score` raises.
    """
    if sampling.stop_sequences:
        raise ValueError("stop_sequences: completions that end by them are not scored early")
    texts = [tokenizer.decode(task.tokens) for task in tasks]
    total = len(tasks) * sampling.num_samples
    tokens: list[list[int]] = [[] for _ in range(total)]
    samples: dict[int, Sample] = {}
    scores: dict[int, Score] = {}
    waiting: list[int] = []
    # Row numbers in flight and what will be their scores: one call at a time.
    running: tuple[list[int], Future[list[Score]]] | None = None

    def collect() -> None:
        nonlocal running
        if running is not None:
            scores.update(zip(running[0], running[1].result(), strict=True))
            running = None

    def start() -> None:
        nonlocal running, waiting
        if waiting:
            running = waiting, thread.submit(score, [samples[row] for row in waiting])
            waiting = []

    def look(seen: Seen) -> None:
        for row, new in seen.tokens.items():
            tokens[row].extend(new.tolist())
            is_stopped = bool(tokens[row]) and tokens[row][-1] in sampling.stop_tokens
            if is_stopped or len(tokens[row]) == sampling.max_tokens:
                which = row // sampling.num_samples
                samples[row] = sample_of(
                    tasks[which], texts[which], np.array(tokens[row], np.int32), tokenizer,
                    is_truncated=not is_stopped,
                )  # fmt: skip
                waiting.append(row)
        if running is None or running[1].done():
            collect()
            start()

    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
    try:
        out = generate(params, *padded(tasks, prompt_len), key, sampling, on_tokens=look)
        while running is not None or waiting:
            collect()
            start()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
    order = range(total)
    return Rollouts(tasks, out, [samples[row] for row in order], [scores[row] for row in order])
