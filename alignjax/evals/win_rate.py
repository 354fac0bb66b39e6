"""Two models and held-out prompts -> how often the first one's completion is preferred.

By a reward, of which the higher one wins; or by a judge, who is asked in both orders, since judges
tend to prefer what stands in one of the two places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from jax.sharding import Mesh
from pydantic import Field, model_validator

from alignjax.core.config import to_dict
from alignjax.core.errors import UserError
from alignjax.core.intervals import or_null, row_means
from alignjax.core.types import Sample
from alignjax.evals.accuracy import Estimate
from alignjax.evals.problems import Problems, open_problems, shot_encoder
from alignjax.evals.provenance import (
    Provenance,
    model_digest,
    prompt_values,
    provenance,
    reward_values,
)
from alignjax.evals.results import write_results
from alignjax.evals.sampler import MakeRewards, Sampler, SamplingConfig
from alignjax.rewards.combine import RewardConfig
from alignjax.rewards.judge import Judge, Pair, Verdict
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.rewards.rollout import Rollouts, joined, no_scores
from alignjax.sharding import MeshConfig, make_mesh

MakeJudge = Callable[[JudgeConfig, Mesh], AbstractContextManager[Judge]]
"""What makes a judge of a config and the devices of a judging model."""


class CompareConfig(SamplingConfig):
    """Two models, prompts, and what compares their completions."""

    kind: Literal["win_rate"] = "win_rate"
    task: str | None = None
    """A name for what is measured, kept with the figures."""
    a: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    b: str
    """Likewise."""
    num_samples: int = Field(1, ge=1)
    """Samples of each prompt from each model; the i-th of the one meets the i-th of the other."""
    rewards: RewardConfig | None = None
    """The completion of the higher reward wins."""
    judge: JudgeConfig | None = None
    """Or the one that the judge prefers."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.rewards is None) == (self.judge is None):
            raise ValueError("give either rewards or judge: what says which completion is better")
        return self


class Verdicts(NamedTuple):
    """[P, n] float64 each; nan where there is none."""

    a_is_better: np.ndarray
    """Probability that the completion of a is better: 1, 0, or 1/2 for a tie."""
    first_is_better: np.ndarray | None = None
    """A judge's mean over both orders for what stood first; 1/2 if places do not matter. None if
    one order alone was asked."""
    orders_agree: np.ndarray | None = None
    """1 where a judge prefers the same completion in both orders, else 0."""


@dataclass(frozen=True)
class Compared:
    """What was found, and every pair."""

    a: Rollouts
    b: Rollouts
    verdicts: Verdicts
    made_of: Provenance | None = None

    @property
    def win_rate(self) -> Estimate:
        """Probability that a's completion is preferred to b's; a tie counts 1/2."""
        return _estimate(self.verdicts.a_is_better)

    def as_json(self) -> dict[str, Any]:
        p = self.verdicts.a_is_better
        known = np.isfinite(p)
        lengths = [r.completions.lengths.reshape(p.shape) for r in (self.a, self.b)]
        longer = np.sign(lengths[0] - lengths[1])
        unequal = known & (longer != 0)
        figures: dict[str, Any] = {
            "win_rate": self.win_rate.as_json(),
            "wins": int((p > 0.5).sum()),
            "ties": int((p == 0.5).sum()),
            "losses": int((p < 0.5).sum()),
            "num_failed": int((~known).sum()),
            "num_prompts": len(p),
            "num_samples": p.shape[1],
            "mean_length": {"a": float(lengths[0].mean()), "b": float(lengths[1].mean())},
        }
        if unequal.any():
            of_longer = np.where(longer > 0, p, 1 - p)
            figures["longer_is_preferred"] = float(of_longer[unequal].mean())
        if self.verdicts.first_is_better is not None:
            figures["first_is_preferred"] = _estimate(self.verdicts.first_is_better).as_json()
        if self.verdicts.orders_agree is not None:
            figures["orders_agree"] = _estimate(self.verdicts.orders_agree).as_json()
        return figures

    def records(self) -> list[dict[str, Any]]:
        """One for each pair of completions."""
        flat = [None if values is None else values.reshape(-1) for values in self.verdicts]
        rows = range(len(self.a.samples))
        both = zip(self.a.records(rows), self.b.records(rows), strict=True)
        return [
            {
                "prompt": a["prompt"],
                "a": {key: value for key, value in a.items() if key in _SIDE},
                "b": {key: value for key, value in b.items() if key in _SIDE},
                "a_is_better": or_null(flat[0][i]),  # type: ignore[index]
                **({} if flat[1] is None else {"first_is_better": or_null(flat[1][i])}),
            }
            for i, (a, b) in enumerate(both)
        ]


_SIDE = ("completion", "reward", "parts", "num_tokens", "is_truncated", "error")


def compare(config: CompareConfig, make_rewards: MakeRewards, make_judge: MakeJudge) -> Compared:
    """Samples the same prompts from both models and has their completions compared.

    One model is on the devices at a time; a judge, if it is one, is the last.

    Args:
      make_rewards: such as `phases.scoring.Rewards`.
      make_judge: such as `phases.judges.open_judge`.
    Raises:
      UserError: if a model cannot be read, no prompt fits, or every comparison failed.
    """
    problems = Problems(open_problems(config.data), config.text.fields, config.num_problems)
    found = [_sampled(path, config, problems, make_rewards) for path in (config.a, config.b)]
    both = sorted(found[0].keys() & found[1].keys())
    if not both:
        raise UserError("data: every prompt is too long and was dropped; allow more tokens")
    a, b = (joined([one[i] for i in both]) for one in found)
    if config.judge is None:
        verdicts = by_reward(a.rewards, b.rewards)
    else:
        with make_judge(config.judge, make_mesh(MeshConfig())) as judge:
            verdicts = by_judge(a, b, judge.pairwise)
    if not np.isfinite(verdicts.a_is_better).any():
        errors = [s.error for out in (a, b) for s in out.scores if s.error is not None]
        raise UserError(f"every comparison failed{': ' + errors[0] if errors else ''}")
    made_of = provenance(
        task=config.task,
        models={"model": config.a},
        data=config.model_dump(mode="json")["data"],
        problems=[problems.digest(i) for i in both],
        prompt=prompt_values(config.text, shots=config.shots, separator=config.shot_separator),
        sampling=config,
        scoring={
            "rewards": None if config.rewards is None else reward_values(config.rewards),
            # Where its answers are kept does not change them.
            "judge": None if config.judge is None else to_dict(config.judge) | {"cache": None},
            "against": {"path": config.b, "digest": model_digest(config.b)},
        },
    )
    return Compared(a, b, verdicts, made_of)


def by_reward(a: np.ndarray, b: np.ndarray) -> Verdicts:
    """The higher reward wins. Args: a, b: [P, n] float; nan where a reward failed."""
    p = np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5))
    return Verdicts(np.where(np.isfinite(a) & np.isfinite(b), p, np.nan))


def by_judge(
    a: Rollouts, b: Rollouts, judge: Callable[[Sequence[Pair]], Sequence[Verdict]]
) -> Verdicts:
    """The one that the judge prefers.

    Args:
      judge: such as `Judge.pairwise`; `first` is the completion of a.
    Raises:
      UserError: if it has no verdict on any pair.
    """
    said = judge([_pair(x, y) for x, y in zip(a.samples, b.samples, strict=True)])
    if all(verdict.value is None for verdict in said):
        raise UserError(f"judge: every call failed: {said[0].error}")
    shape = a.rewards.shape
    value = np.array([np.nan if v.value is None else v.value for v in said]).reshape(shape)
    if not any(len(verdict.places) == 2 for verdict in said):
        return Verdicts(value)
    missing = (np.nan, np.nan)
    places = np.array([v.places or missing for v in said]).reshape(*shape, 2)
    agree = np.sign(places[..., 0] - 0.5) == np.sign(0.5 - places[..., 1])
    known = np.isfinite(places).all(-1)
    return Verdicts(value, places.mean(-1), np.where(known, agree, np.nan))


def write_comparison(comparison: Compared, folder: Path, *, name: str = "compare") -> None:
    """NAME.json with the figures, NAME_problems.jsonl with the win rate of each prompt, and
    NAME_samples.jsonl with every pair."""
    problems = {"win_rate": row_means(comparison.verdicts.a_is_better)}
    write_results(
        folder, comparison.as_json(), comparison.records(), problems, comparison.made_of, name=name
    )


def _sampled(
    path: str, config: CompareConfig, problems: Problems, make_rewards: MakeRewards
) -> dict[int, Rollouts]:
    """Place of a prompt -> its completions; without those that are too long for this model."""
    sampler = Sampler(path, config)
    encode = shot_encoder(config.text, config.shots, config.shot_separator, sampler.tokenizer)
    tasks = problems.tasks(encode, max_tokens=config.max_prompt_tokens, overlong=config.overlong)
    if config.rewards is None:
        out = sampler.sample([*tasks.values()], no_scores)
    else:
        with make_rewards(config.rewards, sampler.tokenizer, sampler.mesh) as score:
            out = sampler.sample([*tasks.values()], score)
    return dict(zip(tasks, out.by_task(), strict=True))


def _pair(a: Sample, b: Sample) -> Pair:
    record = {**a.fields, "reference": a.reference}
    return Pair(a.prompt, a.completion, b.completion, record=record)


def _estimate(values: np.ndarray) -> Estimate:
    """Of the mean over prompts, each the mean of its pairs; those without a verdict left out."""
    means = row_means(values)
    return Estimate.of(means[np.isfinite(means)], values.shape[1])
