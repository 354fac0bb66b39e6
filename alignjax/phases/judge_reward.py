"""Samples -> scores, as a judge has them: one by one, or each against the others of its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh

from alignjax.core.types import Sample, Score
from alignjax.phases.judges import open_judge
from alignjax.rewards.combine import JudgeRewardConfig
from alignjax.rewards.judge import Item, Pair, Verdict
from alignjax.rewards.plain import short


class JudgeReward:
    """A `ScoreFn`, to be closed."""

    def __init__(self, name: str, config: JudgeRewardConfig, mesh: Mesh, folder: Path | None):
        """Args:
          name: of the reward.
          mesh, folder: as of `open_judge`; the folder is one for this reward in the run's.
        Raises:
          UserError: as `open_judge`.
        """
        self._name, self._config = name, config
        own = None if folder is None else folder / "judges" / name
        self._judge = open_judge(config, mesh, own)
        self.close = self._judge.close

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in order."""
        by_method = self._pairwise if self._config.method == "pairwise" else self._pointwise
        return by_method(samples)

    def _pointwise(self, samples: Sequence[Sample]) -> list[Score]:
        items = [Item(s.prompt, s.completion, record=_record(s)) for s in samples]
        half = (self._config.best_score - 1) / 2
        return [
            self._failed(sample, verdict.error)
            if verdict.value is None
            else Score((verdict.value - 1) / half - 1, {"score": verdict.value})
            for sample, verdict in zip(samples, self._judge.pointwise(items), strict=True)
        ]

    def _pairwise(self, samples: Sequence[Sample]) -> list[Score]:
        """Of each sample its mean probability of being better than another one of its prompt. Equal
        texts are as good as each other, and nobody is asked."""
        places = [(i, j) for group in _groups(samples) for i, j in itertools.combinations(group, 2)]
        asked = [(i, j) for i, j in places if samples[i].completion != samples[j].completion]
        said = self._judge.pairwise([
            Pair(samples[i].prompt, samples[i].completion, samples[j].completion,
                 record=_record(samples[i]))
            for i, j in asked
        ])  # fmt: skip
        verdicts = dict(zip(asked, said, strict=True))
        wins: list[list[float]] = [[] for _ in samples]
        first: list[list[float]] = [[] for _ in samples]
        errors: list[str | None] = [None] * len(samples)
        for i, j in places:
            verdict = verdicts.get((i, j), Verdict(0.5))
            if verdict.value is None:
                errors[i] = errors[j] = verdict.error
                continue
            wins[i].append(verdict.value)
            wins[j].append(1 - verdict.value)
            if len(verdict.places) == 2:
                first[i].append(sum(verdict.places) / 2)
                first[j].append(sum(verdict.places) / 2)
        return [
            Score(_mean(won), {"first_place": _mean(f)} if f else {})
            if won
            else self._failed(
                sample, error or "nothing to compare it with: one sample of its prompt"
            )
            for sample, won, f, error in zip(samples, wins, first, errors, strict=True)
        ]

    def _failed(self, sample: Sample, error: str | None) -> Score:
        what = f"prompt {short(sample.prompt)}, completion {short(sample.completion)}"
        return Score(None, error=f"judge {self._name!r}: {error}; {what}")


def _groups(samples: Sequence[Sample]) -> Iterator[range]:
    """Places of samples of one prompt, which stand beside each other."""
    start = 0
    for _, group in itertools.groupby(samples, key=lambda sample: sample.prompt):
        size = len(list(group))
        yield range(start, start + size)
        start += size


def _record(sample: Sample) -> dict[str, object]:
    """What a function may look at besides prompt and completion."""
    return {**sample.fields, "reference": sample.reference}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
