"""A model and held-out problems -> accuracy with its interval, and what the model answered."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, model_validator

from alignjax.core.errors import UserError
from alignjax.core.intervals import Mean, mean_by_row, row_means
from alignjax.core.precision import compute_dtype
from alignjax.evals.accuracy import Estimate, maj_at_k, pass_at_1, pass_at_k
from alignjax.evals.kl import log_ratios
from alignjax.evals.problems import Problems, open_problems, shot_encoder
from alignjax.evals.provenance import Provenance, prompt_values, provenance, reward_values
from alignjax.evals.results import row_figure, write_results
from alignjax.evals.sampler import MakeRewards, Sampler, SamplingConfig
from alignjax.rewards.answers import find_answer, visible
from alignjax.rewards.combine import RewardConfig
from alignjax.rewards.rollout import Rollouts


def _checked(place: str) -> str:
    try:
        find_answer("", place)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return place


Place = Annotated[str, AfterValidator(_checked)]
"""Where an answer stands; see `rewards.answers.find_answer`."""


class EvalConfig(SamplingConfig):
    """What to measure. The config of a grpo run has all of it but the model."""

    kind: Literal["answers"] = "answers"
    task: str | None = None
    """A name for what is measured, kept with the figures."""
    model: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    tokenizer: str | None = None
    rewards: RewardConfig
    correct: str | None = "accuracy"
    """The part of the reward that says whether an answer is right: at least 0.5 counts as right.
    null: no answer is right or wrong, and the reward alone is measured."""
    answer: Place = "answer_tag"
    """Where the answer stands that maj@k votes on; see rewards.verify."""
    reference: str | None = None
    """A model with the same tokenizer, such as the one that training began with: how far the model
    has moved from it is measured, too, as the KL per completion."""

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
    """Over the problems that are in question (`asked`)."""
    rollouts: Rollouts
    correct: str | None = None
    """The part of the reward that they are of."""
    log_ratios: np.ndarray | None = None
    """[P, n] float64, nats: log p - log p_ref of each completion, where a reference was given."""
    made_of: Provenance | None = None

    @property
    def reward(self) -> Mean:
        """Of the problems; samples without a reward are left out."""
        return mean_by_row(self.rollouts.rewards)

    @property
    def num_failed(self) -> int:
        """Samples without a reward."""
        return sum(score.value is None for score in self.rollouts.scores)

    @property
    def mean_length(self) -> float:
        return float(self.rollouts.completions.lengths.mean())

    @property
    def truncated_frac(self) -> float:
        return float(self.rollouts.is_truncated.mean())

    @property
    def kl(self) -> Mean | None:
        """From the reference, nats per completion, where one was given."""
        return None if self.log_ratios is None else mean_by_row(self.log_ratios)

    @property
    def by_problem(self) -> dict[str, np.ndarray]:
        """[P, n] float of every figure that is a mean over samples; nan where there is none."""
        out = self.rollouts
        found = {
            "reward": out.rewards,
            "length": out.completions.lengths.reshape(len(out.tasks), -1),
        }
        if self.log_ratios is not None:
            found["kl"] = self.log_ratios
        return found | {f"parts/{name}": out.part(name) for name in out.part_names}

    def lines(self) -> list[str]:
        """The figures, to be read by people."""
        found = [f"{name:<10} {estimate}" for name, estimate in self.estimates.items()]
        found.append(f"reward     {self.reward}")
        for name in self.rollouts.part_names:
            if name == self.correct:
                continue  # Which is pass@1.
            found.append(f"{name:<10} {mean_by_row(self.rollouts.part(name))}")
        cut = f"{100 * self.truncated_frac:.1f}% cut"
        found.append(f"length     {self.mean_length:.1f} tokens, {cut}")
        if self.kl is not None:
            found.append(f"KL         {self.kl} nats per completion from the reference")
        if self.num_failed:
            found.append(f"failed     {self.num_failed} rewards (counted as wrong)")
        return found

    def as_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {name: e.as_json() for name, e in self.estimates.items()}
        means = {name: row_figure(values) for name, values in self.by_problem.items()}
        if "kl" in means:
            figures["kl"] = means["kl"]
        num_problems = len(self.rollouts.tasks)
        return figures | {
            "reward": means["reward"]["mean"],
            "reward_interval": means["reward"],
            "parts": {
                name.removeprefix("parts/"): mean
                for name, mean in means.items()
                if name.startswith("parts/")
            },
            "mean_length": self.mean_length,
            "length_interval": means["length"],
            "truncated_frac": self.truncated_frac,
            "num_failed_rewards": self.num_failed,
            "num_problems": num_problems,
            "num_samples": len(self.rollouts.samples) // num_problems,
        }


def evaluate(config: EvalConfig, make_rewards: MakeRewards) -> Report:
    """Samples n answers of each problem and scores them.

    A sample whose reward failed counts as wrong here, and is counted: leaving it out would make a
    model look better for answers that break the verifier.

    Args:
      make_rewards: such as `phases.scoring.Rewards`.
    """
    problems = Problems(open_problems(config.data), config.text.fields, config.num_problems)
    sampler = Sampler(config.model, config, config.tokenizer)
    encode = shot_encoder(config.text, config.shots, config.shot_separator, sampler.tokenizer)
    tasks = problems.tasks(encode, max_tokens=config.max_prompt_tokens, overlong=config.overlong)
    with make_rewards(config.rewards, sampler.tokenizer, sampler.mesh) as score:
        out = sampler.sample([*tasks.values()], score)
    if config.correct is not None and config.correct not in out.part_names:
        there_are = (
            ", ".join(out.part_names) or f"none, as every reward failed: {out.scores[0].error}"
        )
        raise UserError(
            f"correct={config.correct!r} is no part of the reward; there are {there_are}"
        )
    ratios = None
    if config.reference is not None:
        dtype = compute_dtype(config.compute_dtype, sampler.mesh.devices.flat[0].platform)
        ratios = log_ratios(out, config.reference, sampler.mesh, temperature=1.0, dtype=dtype)
    made_of = provenance(
        task=config.task,
        models={"model": config.model},
        data=config.model_dump(mode="json")["data"],
        problems=[problems.digest(i) for i in tasks],
        prompt=prompt_values(config.text, shots=config.shots, separator=config.shot_separator),
        sampling=config,
        scoring={
            "rewards": reward_values(config.rewards),
            "correct": config.correct,
            "answer": config.answer,
        },
    )
    return report(out, config.correct, config.answer, log_ratios=ratios, made_of=made_of)


def report(
    rollouts: Rollouts,
    correct_part: str | None,
    answer: str,
    *,
    log_ratios: np.ndarray | None = None,
    made_of: Provenance | None = None,
) -> Report:
    """The reward; with a part that says what is right also pass@1, and where there are several
    samples pass@k and maj@k at k = n and powers of 2."""
    estimates = {} if correct_part is None else _accuracies(rollouts, correct_part, answer)
    return Report(estimates, rollouts, correct_part, log_ratios, made_of)


def asked(rollouts: Rollouts, part: str) -> np.ndarray:
    """[P] bool: which problems are in question. Those that do not get the part, by its `where`, are
    not; those of which a reward failed are."""
    values = rollouts.part(part)
    return np.isfinite(values).any(1) | np.isnan(rollouts.rewards).any(1)


def _accuracies(rollouts: Rollouts, correct_part: str, answer: str) -> dict[str, Estimate]:
    is_asked = asked(rollouts, correct_part)
    correct = rollouts.part(correct_part)[is_asked] >= 0.5
    n = correct.shape[1]
    found = [find_answer(visible(s.prompt, s.completion), answer) for s in rollouts.samples]
    answers = [found[i * n : (i + 1) * n] for i in np.flatnonzero(is_asked)]
    estimates = {"pass@1": pass_at_1(correct)}
    for k in _powers(n):
        estimates[f"pass@{k}"] = pass_at_k(correct, k)
        estimates[f"maj@{k}"] = maj_at_k(answers, correct, k)
    return estimates


def write_report(report: Report, folder: Path) -> None:
    """eval.json with the figures, eval_problems.jsonl with those of each problem, and
    eval_samples.jsonl with every answer."""
    problems: dict[str, np.ndarray] = {}
    for name, estimate in report.estimates.items():
        problems[name] = np.full(len(report.rollouts.tasks), np.nan)
        problems[name][asked(report.rollouts, report.correct)] = estimate.values
    problems |= {name: row_means(values) for name, values in report.by_problem.items()}
    records = report.rollouts.records(range(len(report.rollouts.samples)))
    write_results(folder, report.as_json(), records, problems, report.made_of)


def _powers(n: int) -> Sequence[int]:
    powers = [2**i for i in range(1, n.bit_length()) if 2**i <= n]
    return powers if n in (*powers, 1) else [*powers, n]
