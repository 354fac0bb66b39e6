"""A user's Python function as a judge: called like a reward function, in processes of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alignjax.core.errors import UserError
from alignjax.core.types import Sample, Score
from alignjax.rewards.combine import FunctionConfig, RewardConfig
from alignjax.rewards.judge_answer import Answer, Question, Usage
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.rewards.pool import RewardPool

_BATCH = 32
"""Questions for each worker whose answers are handed on together."""


class FunctionAsk:
    """An `Ask`. Closed by `close`.

    Attributes:
      identity: of the function: its path, its options and what stands in its file.
      account: under which its calls are counted.
    """

    def __init__(self, config: JudgeConfig, *, log_path: Path | None = None):
        """Raises: UserError: if the function of the config cannot be loaded."""
        assert config.function is not None
        function = FunctionConfig(function=config.function, args=config.args)
        rewards = RewardConfig(
            functions={"judge": function},
            timeout_s=config.timeout_s,
            num_workers=config.num_workers,
        )
        self._pool = RewardPool(rewards, log_path=log_path)
        self._size = _BATCH * config.num_workers
        self.close = self._pool.close
        self.account = f"function {config.function}"
        self.identity = json.dumps([config.function, config.args, source_digest(config.function)])

    def __call__(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer]]:
        for start in range(0, len(questions), self._size):
            part = questions[start : start + self._size]
            scores = self._pool([_sample(question) for question in part])
            answers = map(_answer, part, scores)
            yield dict(enumerate(answers, start))


def _sample(question: Question) -> Sample:
    fields = question.fields
    judged = fields["first"] if "first" in fields else fields["response"]
    return Sample(fields["prompt"], judged, fields.get("reference"), fields)


def _answer(question: Question, score: Score) -> Answer:
    usage = Usage(num_requests=1)
    if score.value is None:
        return Answer(usage=usage, error=score.error)
    is_pair = "first" in question.fields
    chances = _of_pair(score.value) if is_pair else _of_score(score.value, len(question.options))
    logps = tuple(math.log(p) if p > 0 else -math.inf for p in chances)
    return Answer(str(score.value), logps, usage)


def _of_pair(p: float) -> tuple[float, float]:
    if not 0 <= p <= 1:
        raise UserError(
            f"judge: {p} is no probability; expected a number from 0 to 1: how probable it is that "
            "`first` is better than `second`"
        )
    return p, 1 - p


def _of_score(value: float, best: int) -> list[float]:
    """Probabilities of 1, ..., best, on the two scores next to a value, whose mean it is."""
    if not 1 <= value <= best:
        raise UserError(f"judge: {value} is no score; expected a number from 1 to {best}")
    return [max(0.0, 1 - abs(value - score)) for score in range(1, best + 1)]


def source_digest(path: str) -> str:
    """SHA-256 of the file in which a function is defined; "" if it is not found as a file.

    Args:
      path: as of `rewards.functions.load`. Nothing is imported.
    """
    module, colon, _ = path.rpartition(":")
    if not colon:
        module = path.rpartition(".")[0]
    if module.endswith(".py"):
        files = [Path(module)]
    else:
        parts = module.split(".")
        roots = [Path(root or os.getcwd(), *parts) for root in (*sys.path, "")]
        files = [f for r in roots for f in (r.with_name(f"{r.name}.py"), r / "__init__.py")]
    for file in files:
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    return ""
