"""A reward model and held-out preferences -> how often it ranks two responses as people did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from alignjax.core import digest
from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.data import (
    LAYOUTS,
    Comparison,
    Preference,
    Preferences,
    TextOptions,
    comparison_encoder,
    open_preferences,
)
from alignjax.data.comparisons import ranked_pairs
from alignjax.data.pipeline import fits, located
from alignjax.evals.accuracy import Estimate
from alignjax.evals.provenance import Provenance, prompt_values, provenance
from alignjax.evals.results import write_results

ScoreIds = Callable[[Sequence[np.ndarray]], np.ndarray]
"""Texts as ids, [length] int32 each -> [N] their scores; such as `RewardModel.score_ids`."""


class PreferenceEvalConfig(Config):
    """What to measure. The config of a reward run has all of it but the model."""

    kind: Literal["preference"] = "preference"
    task: str | None = None
    """A name for what is measured, kept with the figures."""
    model: str
    """A reward model's directory, such as runs/NAME/model."""
    preferences: str | list[str]
    """As data.train of phase reward."""
    layout: Literal["auto", *LAYOUTS] = "auto"
    """How records are written down; auto goes by the keys of the first one."""
    annotators: list[str] | None = None
    """Ids of those who may have judged; null: anybody."""
    faulty: Literal["error", "drop"] = "error"
    """What to do with a record that is wrong, such as two equal responses."""
    text: TextOptions = TextOptions()
    max_len: int = Field(1024, ge=2)
    """Tokens of a prompt and its response, at most."""
    overlong: Literal["error", "drop"] = "drop"
    """What to do with a preference that has a longer one. It is never cut."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""


@dataclass(frozen=True)
class Agreement:
    """How two orders of the responses of P prompts agree."""

    accuracy: Estimate
    """Probability that of two responses of a prompt, of which one was preferred, that one has the
    higher score; 1/2 where both have the same. Each prompt counts once."""
    margin: float
    """Mean difference of these scores."""
    num_pairs: int
    num_left_out: int
    """Preferences that say of no two responses which is better."""
    num_dropped: int
    """Preferences left out as too long."""
    records: list[dict[str, Any]]
    """One for each preference: `prompt`, `responses`, `scores` and `accuracy`."""
    digests: list[str]
    """Of each preference: its prompt, and which response is better than which."""

    def as_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy.as_json(),
            "margin": self.margin,
            "num_preferences": self.accuracy.num_problems,
            "num_pairs": self.num_pairs,
            "num_left_out": self.num_left_out,
            "num_dropped": self.num_dropped,
        }


def open_held_out(config: PreferenceEvalConfig) -> Preferences:
    """Raises UserError on the first record that is wrong, unless faulty ones are dropped."""
    return open_preferences(
        config.preferences, config.layout, annotators=config.annotators, faulty=config.faulty
    )


def agreement(
    config: PreferenceEvalConfig, source: Preferences, tokenizer: Tokenizer, score: ScoreIds
) -> Agreement:
    """Scores all responses that are compared, and compares.

    Args:
      source: of `open_held_out`.
      tokenizer: the reward model's.
      score: of the model.
    Raises:
      UserError: if nothing is left to compare.
    """
    encode = comparison_encoder(config.text, tokenizer)

    def texts(preference: Preference) -> tuple[list[tuple[str, str]], dict[str, np.ndarray]]:
        pairs = ranked_pairs(preference)
        responses = list(dict.fromkeys(text for pair in pairs for text in pair))
        if not responses:
            return [], {}
        ranks = (1,) * len(responses)
        element = encode(Comparison(preference.prompt, responses, ranks))
        ids = [np.concatenate([element.prompt, one]) for one in element.completions]
        return pairs, dict(zip(responses, ids, strict=True))

    found, num_left_out, num_dropped = [], 0, 0
    for i in range(len(source)):
        pairs, ids = located(source, i, texts)
        if not pairs:
            num_left_out += 1
        elif fits(source, i, max(map(len, ids.values())), config.max_len, config.overlong):
            found.append((source[i].prompt, pairs, ids))
        else:
            num_dropped += 1
    if not found:
        raise UserError(
            f"preferences: of {len(source)} nothing is left to compare: {num_dropped} are longer "
            f"than max_len={config.max_len} tokens, {num_left_out} prefer no response to another"
        )
    scores = iter(score([one for *_, ids in found for one in ids.values()]).tolist())
    records, values, margins = [], [], []
    for prompt, pairs, ids in found:
        known = {text: next(scores) for text in ids}
        differences = np.array([known[better] - known[worse] for better, worse in pairs])
        values.append(float(np.mean((np.sign(differences) + 1) / 2)))
        margins += differences.tolist()
        records.append(
            {
                "prompt": prompt,
                "responses": list(known),
                "scores": list(known.values()),
                "accuracy": values[-1],
            }
        )
    most = max(len(pairs) for _, pairs, _ in found)
    return Agreement(
        Estimate.of(np.array(values), most),
        margin=float(np.mean(margins)),
        num_pairs=len(margins),
        num_left_out=num_left_out,
        num_dropped=num_dropped,
        records=records,
        digests=[digest.of_value([prompt, pairs]) for prompt, pairs, _ in found],
    )


def made_of(config: PreferenceEvalConfig, found: Agreement) -> Provenance:
    """What an agreement depends on."""
    return provenance(
        task=config.task,
        models={"model": config.model},
        data=config.preferences,
        problems=found.digests,
        prompt=prompt_values(config.text),
        sampling=None,
        scoring={},
    )


def write_agreement(found: Agreement, folder: Path, made_of: Provenance | None = None) -> None:
    """eval.json with the figures, eval_problems.jsonl with those of each preference, and
    eval_samples.jsonl with every score."""
    problems = {"accuracy": found.accuracy.values}
    write_results(folder, found.as_json(), found.records, problems, made_of)
