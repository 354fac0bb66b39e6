"""A model and held-out problems -> accuracy with its interval, and what the model answered."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import field_validator, model_validator

from alignjax.core.errors import UserError
from alignjax.core.intervals import Mean, mean_by_row
from alignjax.core.precision import compute_dtype
from alignjax.data import Examples, examples, open_source, prompt_encoder
from alignjax.evals.accuracy import Estimate, maj_at_k, pass_at_1, pass_at_k
from alignjax.evals.kl import log_ratios
from alignjax.evals.sampler import MakeRewards, Sampler, SamplingConfig
from alignjax.rewards.answers import find_answer, visible
from alignjax.rewards.combine import RewardConfig
from alignjax.rewards.rollout import Rollouts, Task


class EvalConfig(SamplingConfig):
    """What to measure. The config of a grpo run has all of it but the model."""

    model: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    tokenizer: str | None = None
    rewards: RewardConfig
    correct: str | None = "accuracy"
    """The part of the reward that says whether an answer is right: at least 0.5 counts as right.
    null: no answer is right or wrong, and the reward alone is measured."""
    answer: str = "answer_tag"
    """Where the answer stands that maj@k votes on; see rewards.verify."""
    reference: str | None = None
    """A model with the same tokenizer, such as the one that training began with: how far the model
    has moved from it is measured, too, as the KL per completion."""

    @field_validator("answer")
    @classmethod
    def _is_place(cls, place: str) -> str:
        try:
            find_answer("", place)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return place

    @model_validator(mode="after")
    def _samples_all(self) -> Self:
        if self.reference is not None and (self.temperature, self.top_k, self.top_p) != (1, 0, 1):
            raise ValueError(
                f"reference: the KL is that of what the model samples by itself; with temperature="
                f"{self.temperature}, top_k={self.top_k}, top_p={self.top_p} it is of something "
                "else: set them to 1, 0 and 1, or leave reference out"
            )
        return self


@dataclass(frozen=True)
class Report:
    """The figures, by name, and every sample."""

    estimates: dict[str, Estimate]
    reward: Mean
    """Of the problems; samples without a reward are left out."""
    mean_length: float
    truncated_frac: float
    num_failed: int
    rollouts: Rollouts
    kl: Mean | None = None
    """From the reference, nats per completion, where one was given."""

    def as_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {
            name: {"mean": e.mean, "low": e.low, "high": e.high}
            for name, e in self.estimates.items()
        }
        if self.kl is not None:
            figures["kl"] = self.kl.as_json()
        return figures | {
            "reward": self.reward.as_json()["mean"],
            "reward_interval": self.reward.as_json(),
            "mean_length": self.mean_length,
            "truncated_frac": self.truncated_frac,
            "num_failed_rewards": self.num_failed,
            "num_problems": len(self.rollouts.tasks),
            "num_samples": len(self.rollouts.samples) // len(self.rollouts.tasks),
        }


def evaluate(config: EvalConfig, make_rewards: MakeRewards) -> Report:
    """Samples n answers of each problem and scores them.

    A sample whose reward failed counts as wrong here, and is counted: leaving it out would make a
    model look better for answers that break the verifier.

    Args:
      make_rewards: such as `phases.scoring.Rewards`.
    """
    sampler = Sampler(config.model, config, config.tokenizer)
    source = Examples(open_source(config.data), config.text.fields)
    prompts = next(
        examples(
            source,
            prompt_encoder(config.text, sampler.tokenizer),
            num_prompts=min(config.num_problems or len(source), len(source)),
            prompt_len=config.max_prompt_tokens,
            overlong=config.overlong,
            shuffle=False,
            num_epochs=1,
        )
    )
    tasks = [Task(p.tokens, p.example.reference, p.example.fields) for p in prompts]
    with make_rewards(config.rewards, sampler.tokenizer, sampler.mesh) as score:
        out = sampler.sample(tasks, score)
    if config.correct is not None and config.correct not in out.part_names:
        there_are = (
            ", ".join(out.part_names) or f"none, as every reward failed: {out.scores[0].error}"
        )
        raise UserError(
            f"correct={config.correct!r} is no part of the reward; there are {there_are}"
        )
    found = report(out, config.correct, config.answer)
    if config.reference is None:
        return found
    dtype = compute_dtype(config.compute_dtype, sampler.mesh.devices.flat[0].platform)
    ratios = log_ratios(out, config.reference, sampler.mesh, temperature=1.0, dtype=dtype)
    return dataclasses.replace(found, kl=mean_by_row(ratios))


def report(rollouts: Rollouts, correct_part: str | None, answer: str) -> Report:
    """The reward; with a part that says what is right also pass@1, and where there are several
    samples pass@k and maj@k at k = n and powers of 2."""
    valued = [score.value for score in rollouts.scores if score.value is not None]
    return Report(
        {} if correct_part is None else _accuracies(rollouts, correct_part, answer),
        reward=mean_by_row(rollouts.rewards),
        mean_length=float(rollouts.completions.lengths.mean()),
        truncated_frac=float(rollouts.is_truncated.mean()),
        num_failed=len(rollouts.scores) - len(valued),
        rollouts=rollouts,
    )


def _accuracies(rollouts: Rollouts, correct_part: str, answer: str) -> dict[str, Estimate]:
    # Problems that do not get this part, by its `where`, are not in question; those of which a
    # reward failed are.
    values = rollouts.part(correct_part)
    is_asked = np.isfinite(values).any(1) | np.isnan(rollouts.rewards).any(1)
    correct = values[is_asked] >= 0.5
    n = correct.shape[1]
    found = [find_answer(visible(s.prompt, s.completion), answer) for s in rollouts.samples]
    answers = [found[i * n : (i + 1) * n] for i in np.flatnonzero(is_asked)]
    estimates = {"pass@1": pass_at_1(correct)}
    for k in _powers(n):
        estimates[f"pass@{k}"] = pass_at_k(correct, k)
        estimates[f"maj@{k}"] = maj_at_k(answers, correct, k)
    return estimates


def write_report(report: Report, folder: Path) -> None:
    """eval.json with the figures, and eval_samples.jsonl with every answer."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.as_json(), indent=2) + "\n"
    (folder / "eval.json").write_text(text, encoding="utf-8")
    samples = folder / "eval_samples.jsonl"
    # Half of a surrogate pair is no UTF-8; escaped, it is JSON.
    with samples.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in report.rollouts.records(range(len(report.rollouts.samples))):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _powers(n: int) -> Sequence[int]:
    powers = [2**i for i in range(1, n.bit_length()) if 2**i <= n]
    return powers if n in (*powers, 1) else [*powers, n]
