"""A model and questions with options -> how often the right one is the likeliest, and is named.

The likeliest option is the one whose text has the highest log-prob after the prompt; the one that
is named stands in what the model says. The first asks nothing of the form of an answer, the second
is what a user sees.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from alignjax.core import digest
from alignjax.core.errors import UserError
from alignjax.core.types import Sample, Score
from alignjax.data import Source
from alignjax.data.schema import kind
from alignjax.evals.accuracy import Estimate
from alignjax.evals.problems import Problems, open_problems, shot_encoder
from alignjax.evals.provenance import Provenance, prompt_values, provenance
from alignjax.evals.results import write_results
from alignjax.evals.run import Place, Report, report
from alignjax.evals.sampler import Sampler, SamplingConfig
from alignjax.rewards.answers import find_answer, visible
from alignjax.rewards.rollout import Task

LETTERS = string.ascii_uppercase


class ChoiceConfig(SamplingConfig):
    """Questions with options, of which one is right.

    Beside its own keys, a record has `listed` (a line `A. text` for each option), `letter` and
    `option` (those of the right one) for text.fields and shots to read.
    """

    kind: Literal["choices"]
    task: str | None = None
    """A name for what is measured, kept with the figures."""
    model: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    tokenizer: str | None = None
    options: str = "choices"
    """The key of a record that holds the texts of the options; `choices.text` is one in another."""
    label: str = "answer"
    """The key that says which option is right: a whole number from 0, or a letter from A."""
    candidate: str = " {letter}"
    """What stands after the prompt for each option, of which the log-prob is taken: a template over
    {letter} and {option}."""
    generate: bool = True
    """Also have the model say its answer."""
    answer: Place = r"regex:\A\W*([A-Z])\b"
    """Where the letter stands in what it says; see rewards.verify."""
    num_samples: int = Field(1, ge=1)
    """Answers that the model says to each question."""

    @field_validator("candidate")
    @classmethod
    def _is_template(cls, template: str) -> str:
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(template) if name}
        except ValueError as error:
            raise ValueError(f"{template!r} is no template: {error}") from error
        if not named or not named <= {"letter", "option"}:
            raise ValueError(f"{template!r}: expected {{letter}}, {{option}} or both, and no other")
        return template


class Choices:
    """A source of records with options, as `ChoiceConfig` describes them."""

    def __init__(self, source: Source, options: str, label: str):
        self._source, self._options, self._label = source, options, label

    def __len__(self) -> int:
        return len(self._source)

    def where(self, index: int) -> str:
        return self._source.where(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises UserError if its options or its label are none."""
        try:
            return with_choices(self._source[index], self._options, self._label)
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from error


def with_choices(record: dict[str, Any], options: str, label: str) -> dict[str, Any]:
    """A record and, besides, `options`, `listed`, `letter`, `option` and `right`, the place of the
    right one. Raises UserError if it has no options or no label."""
    texts = _at(record, options, "options")
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"options: {options!r}: expected a list of texts, came {kind(texts)}")
    if not 2 <= len(texts) <= len(LETTERS):
        raise UserError(
            f"options: {options!r}: {len(texts)} of them; expected 2 to {len(LETTERS)}, one right"
        )
    if len(set(texts)) < len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise UserError(f"options: {options!r}: {twice!r} stands there twice")
    value = _at(record, label, "label")
    right = LETTERS.find(value) if isinstance(value, str) and len(value) == 1 else value
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(texts):
        raise UserError(
            f"label: {label!r}: expected a number from 0 to {len(texts) - 1} or a letter from A to "
            f"{LETTERS[len(texts) - 1]}, came {kind(value)}"
        )
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    return {
        **record,
        "options": texts,
        "listed": listed,
        "letter": LETTERS[right],
        "option": texts[right],
        "right": right,
    }


def _at(record: Any, path: str, name: str) -> Any:
    for key in path.split("."):
        if not isinstance(record, dict) or key not in record:
            there = ", ".join(map(repr, record)) if isinstance(record, dict) else "none"
            raise UserError(f"{name}: no field {path!r} (fields there: {there or 'none'})")
        record = record[key]
    return record


@dataclass(frozen=True)
class ChoiceReport:
    """What was found, and every question."""

    logps: list[np.ndarray]
    """[K] float64, nats: of each question's options, that of the whole candidate."""
    num_tokens: list[np.ndarray]
    """[K] int; of the candidates."""
    records: list[dict[str, Any]]
    """The questions, as `with_choices` has them."""
    said: Report | None
    """What the model said, where it was asked."""
    made_of: Provenance | None = None

    @property
    def estimates(self) -> dict[str, Estimate]:
        right = [record["right"] for record in self.records]
        per_token = [x / n for x, n in zip(self.logps, self.num_tokens, strict=True)]
        return {
            "accuracy": Estimate.of(chosen(self.logps, right), 1),
            "accuracy_per_token": Estimate.of(chosen(per_token, right), 1),
            **({} if self.said is None else self.said.estimates),
        }

    def as_json(self) -> dict[str, Any]:
        figures = {name: estimate.as_json() for name, estimate in self.estimates.items()}
        figures["chance"] = float(np.mean([1 / len(logps) for logps in self.logps]))
        figures["num_problems"] = len(self.records)
        if self.said is not None:
            figures["num_samples"] = len(self.said.rollouts.samples) // len(self.records)
            figures["no_letter_frac"] = float((self.said.rollouts.part("letter") == 0).mean())
        return figures


def chosen(scores: Sequence[np.ndarray], right: Sequence[int]) -> np.ndarray:
    """[P] float64: whether the highest score is that of the right option; of k that share it, 1/k.

    Args:
      scores: [K] of each question.
      right: the place of the right one.
    """
    found = []
    for values, place in zip(scores, right, strict=True):
        is_best = values == values.max()
        found.append(is_best[place] / is_best.sum())
    return np.array(found, np.float64)


def evaluate_choices(config: ChoiceConfig) -> ChoiceReport:
    """Takes the log-prob of each option of each question, and asks the model for its letter.

    Raises:
      UserError: on a record without options or without a label, or one that is too long.
    """
    source = Choices(open_problems(config.data), config.options, config.label)
    problems = Problems(source, config.text.fields, config.num_problems)
    shots = [_shot(config, shot, i) for i, shot in enumerate(config.shots)]
    sampler = Sampler(config.model, config, config.tokenizer)
    encode = shot_encoder(config.text, shots, config.shot_separator, sampler.tokenizer)
    tasks = problems.tasks(encode, max_tokens=config.max_prompt_tokens, overlong=config.overlong)
    records = [problems.record(i) for i in tasks]
    candidates = [
        [_candidate(config, sampler, task, *option) for option in _letters(record)]
        for task, record in zip(tasks.values(), records, strict=True)
    ]
    texts = [
        np.concatenate([task.tokens, ids])
        for task, rows in zip(tasks.values(), candidates, strict=True)
        for ids in rows
    ]
    lengths = np.array([len(ids) for rows in candidates for ids in rows], np.int32)
    ends = np.cumsum([len(rows) for rows in candidates])[:-1]
    said = None
    if config.generate:
        asked = [
            Task(task.tokens, record["letter"], {"num_options": len(record["options"])})
            for task, record in zip(tasks.values(), records, strict=True)
        ]
        out = sampler.sample(asked, lambda samples: [_judge(config.answer, s) for s in samples])
        said = report(out, "accuracy", config.answer)
    return ChoiceReport(
        np.split(sampler.logps(texts, lengths), ends),
        np.split(lengths, ends),
        records,
        said,
        provenance(
            task=config.task,
            models={"model": config.model},
            data=config.model_dump(mode="json")["data"],
            problems=[
                digest.of_value([problems.digest(i), record["options"], record["right"]])
                for i, record in zip(tasks, records, strict=True)
            ],
            prompt=prompt_values(config.text, shots=config.shots, separator=config.shot_separator),
            sampling=config if config.generate else None,
            scoring=config.model_dump(mode="json", include={"candidate", "generate", "answer"}),
        ),
    )


def _letters(record: dict[str, Any]) -> list[tuple[str, str]]:
    return list(zip(LETTERS, record["options"], strict=False))


def _shot(config: ChoiceConfig, shot: dict[str, Any], place: int) -> dict[str, Any]:
    try:
        return with_choices(shot, config.options, config.label)
    except UserError as error:
        raise UserError(f"shots.{place}: {error}") from error


def _candidate(
    config: ChoiceConfig, sampler: Sampler, task: Task, letter: str, option: str
) -> np.ndarray:
    text = config.candidate.format(letter=letter, option=option)
    ids = np.array(sampler.tokenizer.encode(text, task.tokens.tolist()), np.int32)
    if not len(ids):
        raise UserError(f"candidate: {text!r} has no tokens")
    return ids


def _judge(place: str, sample: Sample) -> Score:
    """Whether the letter that stands at the place is that of the right option."""
    letter = find_answer(visible(sample.prompt, sample.completion), place)
    there_are = LETTERS[: sample.fields["num_options"]]
    is_letter = letter is not None and len(letter) == 1 and letter in there_are
    value = float(letter == sample.reference)
    return Score(value, {"accuracy": value, "letter": float(is_letter)})


def write_choices(found: ChoiceReport, folder: Path) -> None:
    """eval.json with the figures, eval_problems.jsonl with those of each question, and
    eval_samples.jsonl with what the model made of each."""
    said: list[list[str]] = [[] for _ in found.records]
    if found.said is not None:
        samples = found.said.rollouts.samples
        n = len(samples) // len(found.records)
        said = [[s.completion for s in samples[i : i + n]] for i in range(0, len(samples), n)]
    problems = {name: estimate.values for name, estimate in found.estimates.items()}
    lines = [
        {
            "options": record["options"],
            "letter": record["letter"],
            "logps": logps.tolist(),
            "num_tokens": num.tolist(),
            "completions": texts,
            "listed": record["listed"],
        }
        for record, logps, num, texts in zip(
            found.records, found.logps, found.num_tokens, said, strict=True
        )
    ]
    write_results(folder, found.as_json(), lines, problems, found.made_of)
