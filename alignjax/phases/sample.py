"""Prompts -> several completions of each, judged by rewards or not: records of preferences.

A data phase: nothing is trained. Its file is what `alignjax label` and the phases on preferences
read; of the best completions it also makes what `phase: sft` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from alignjax.core.types import Sample, Score
from alignjax.data import Example
from alignjax.phases.produce import State
from alignjax.phases.responses import Responses, demonstration
from alignjax.phases.sample_config import SampleConfig
from alignjax.rewards.plain import to_json
from alignjax.train.metrics import replace_file

BEST, FIGURES = "best.jsonl", "sample.json"


COUNTS = {
    "num_prompts": "prompts sampled from",
    "num_dropped": "prompts left out as too long",
    "num_samples": "completions sampled",
    "num_truncated": "of these, cut at max_tokens",
    "num_empty": "completions left out as empty",
    "num_duplicates": "completions left out as equal to an earlier one of the prompt",
    "num_failed_rewards": "completions without a score",
    "num_records": "records written",
    "num_left_out": "prompts left out, as fewer than two responses (or no score) remained",
}
"""What sample.json counts."""


@dataclass(frozen=True)
class _Kept:
    """A completion that becomes a response."""

    sample: Sample
    score: Score | None


class SampleResponses:
    """Implements `phases.produce.DataPhase`."""

    output = "preferences.jsonl"
    shown = ("num_prompts", "num_records", "num_failed_rewards")

    def __init__(self, config: SampleConfig, mesh: Mesh):
        self._config = config
        self._responses = Responses(config, mesh, config.rewards)
        self._is_judged = config.rewards is not None

    @property
    def warnings(self) -> list[str]:
        return self._responses.warnings

    def init(self) -> State:
        return {
            "position": self._responses.start,
            "counts": dict.fromkeys(COUNTS, 0),
            "best_of": {},  # k -> the sum over prompts of the mean highest score of k samples
            "num_compared": 0,  # prompts in these sums: those whose samples all have a score
        }

    def produce(self, state: State) -> tuple[Sequence[Mapping[str, Any]], State] | None:
        counts = dict(state["counts"])
        drawn = self._responses.draw(state["position"], counts["num_prompts"])
        if drawn is None:
            return None
        prompts, out = drawn.prompts, drawn.rollouts
        if self._is_judged:
            counts["num_failed_rewards"] += sum(score.value is None for score in out.scores)
        counts["num_prompts"] += len(prompts)
        counts["num_samples"] += len(out.samples)
        counts["num_truncated"] += int(out.is_truncated.sum())
        counts["num_dropped"] = drawn.num_dropped
        size, records = self._responses.num_samples, []
        best_of, num_compared = dict(state["best_of"]), state["num_compared"]
        for i, prompt in enumerate(prompts):
            group = slice(i * size, (i + 1) * size)
            scores = [score.value for score in out.scores[group]]
            if all(score is not None for score in scores):
                num_compared += 1
                for k in _powers(size):
                    best = expected_best(scores, k)  # type: ignore[arg-type]
                    best_of[str(k)] = best_of.get(str(k), 0.0) + best
            kept = self._kept(out.samples[group], out.scores[group], counts)
            record = self._record(prompt.example, kept)
            counts["num_left_out" if record is None else "num_records"] += 1
            records += [] if record is None else [record]
        return records, {
            "position": drawn.position,
            "counts": counts,
            "best_of": best_of,
            "num_compared": num_compared,
        }

    def _kept(
        self, samples: Sequence[Sample], scores: Sequence[Score], counts: dict[str, int]
    ) -> list[_Kept]:
        """The completions of a prompt that can be compared: none empty, no two equal."""
        kept: dict[str, _Kept] = {}
        for sample, score in zip(samples, scores, strict=True):
            if not sample.completion.strip():
                counts["num_empty"] += 1
            elif sample.completion in kept:
                counts["num_duplicates"] += 1
            elif not (sample.is_truncated and self._config.truncated == "drop"):
                kept[sample.completion] = _Kept(sample, score if self._is_judged else None)
        return list(kept.values())

    def _record(self, example: Example, kept: Sequence[_Kept]) -> dict[str, Any] | None:
        """The record of a prompt; None if nothing can be said or asked of its responses."""
        scores = [None if one.score is None else one.score.value for one in kept]
        if len(kept) < 2 or (self._is_judged and all(score is None for score in scores)):
            return None
        reference = {} if example.reference is None else {"reference": example.reference}
        own = {
            "prompt": self._responses.written(example),
            "responses": [one.sample.completion for one in kept],
            **({"scores": scores} if self._is_judged else {}),
            "num_tokens": [one.sample.num_tokens for one in kept],
            "is_truncated": [one.sample.is_truncated for one in kept],
        }
        fields = {k: v for k, v in {**example.fields, **reference}.items() if k not in own}
        return own | json.loads(to_json(fields))

    def finish(self, state: State, records: Iterable[dict[str, Any]], run_dir: Path) -> str:
        """Writes sample.json, and best.jsonl where there are scores."""
        if self._is_judged:
            lines = [json.dumps(_best(record), ensure_ascii=False) + "\n" for record in records]
            replace_file(run_dir / BEST, "".join(lines).encode(errors="backslashreplace"))
        figures: dict[str, Any] = dict(state["counts"])
        if state["num_compared"]:
            means = {k: total / state["num_compared"] for k, total in state["best_of"].items()}
            figures |= {"num_compared": state["num_compared"], "reward_of_best_of": means}
        replace_file(run_dir / FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
        said = [f"{value} {COUNTS[name]}" for name, value in state["counts"].items() if value]
        if "reward_of_best_of" in figures:
            of = figures["reward_of_best_of"].items()
            said.append("mean reward of the best of " + ", ".join(f"{k}: {m:.4g}" for k, m in of))
        return "; ".join(said)

    def close(self) -> None:
        self._responses.close()


def expected_best(scores: Sequence[float], k: int) -> float:
    """Mean highest score of k of n samples, over all choices of k.

    Of the i-th lowest of n, C(i - 1, k - 1) of C(n, k) choices have it as their highest. Unbiased,
    unlike the highest of all n is for a smaller k.

    Args:
      scores: n of them, 1 <= k <= n.
    Source: as pass@k, arXiv:2107.03374 eq. 1, for values other than 0 and 1.
    """
    ordered = sorted(scores)
    chosen = (math.comb(i, k - 1) * score for i, score in enumerate(ordered))
    return math.fsum(chosen) / math.comb(len(ordered), k)


def _best(record: Mapping[str, Any]) -> dict[str, Any]:
    """The best response of a record, the first if several are, as `phase: sft` reads it: `prompt`
    and `completion`, or `messages`."""
    scored = [(s, -i) for i, s in enumerate(record["scores"]) if s is not None]
    score, place = max(scored)
    response = record["responses"][-place]
    found = demonstration(record["prompt"], response)
    own = {"prompt", "responses", "scores", "num_tokens", "is_truncated"}
    rest = {key: value for key, value in record.items() if key not in own | found.keys()}
    return {**found, "score": score, **rest}


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    powers = [2**i for i in range(n.bit_length())]
    return powers if powers[-1] == n else [*powers, n]
