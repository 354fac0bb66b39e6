"""Rejection sampling: prompts -> the completions that rewards find good, for `phase: sft`.

A data phase: nothing is trained. It keeps completions that end by themselves and pass every
threshold, each once, and counts the others by the reason why they are left out. Source:
arXiv:2501.12948 sec. 2.3.3, stage 3 of DeepSeek-R1, and arXiv:2308.01825 (RFT).
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.types import Sample, Score
from alignjax.data import Example, Examples
from alignjax.phases.produce import State
from alignjax.phases.reject_config import RejectConfig
from alignjax.phases.responses import Responses, demonstration
from alignjax.rewards.combine import names_for
from alignjax.rewards.plain import to_json
from alignjax.train.metrics import replace_file

BALANCED, FIGURES = "balanced.jsonl", "reject.json"
BELOW = "num_below/"
"""Before the name of a threshold: completions that do not reach it."""
COUNTS = {
    "num_prompts": "prompts sampled from",
    "num_repeated": "prompts left out as equal to an earlier one",
    "num_dropped": "prompts left out as too long",
    "num_samples": "completions sampled",
    "num_kept": "kept",
    "num_failed_rewards": "without a score",
    "num_truncated": "cut at max_tokens",
    "num_empty": "empty",
    BELOW: "below the threshold of ",
    "num_duplicates": "equal to a better one of the prompt, but for white space",
    "num_over": "beyond max_per_prompt",
    "num_unsolved": "prompts of which nothing is kept",
}
"""What reject.json counts. Each completion is counted once besides `num_samples`."""


class Reject:
    """Implements `phases.produce.DataPhase`."""

    output = "kept.jsonl"
    shown = ("num_prompts", "num_samples", "num_kept")

    def __init__(self, config: RejectConfig, mesh: Mesh):
        self._config = config
        self._num_repeated = 0
        self._responses = Responses(config, mesh, config.rewards, view=self._distinct)

    def _distinct(self, found: Examples) -> Distinct:
        distinct = Distinct(found)
        self._num_repeated = len(found) - len(distinct)
        if (field := self._config.balance) is not None:
            for index in range(len(distinct)):
                if field not in (fields := distinct[index].fields):
                    raise UserError(
                        f"{distinct.where(index)}: balance: no field {field!r} (fields there: "
                        f"{', '.join(fields) or 'none'})"
                    )
        return distinct

    @property
    def warnings(self) -> list[str]:
        return self._responses.warnings

    def init(self) -> State:
        names = [name for name in COUNTS if name != BELOW]
        counts = dict.fromkeys([*names, *(BELOW + name for name in self._config.keep)], 0)
        counts["num_repeated"] = self._num_repeated
        return {"position": self._responses.start, "counts": counts}

    def produce(self, state: State) -> tuple[Sequence[Mapping[str, Any]], State] | None:
        counts = dict(state["counts"])
        drawn = self._responses.draw(state["position"], counts["num_prompts"])
        if drawn is None:
            return None
        out, size = drawn.rollouts, self._responses.num_samples
        counts["num_prompts"] += len(drawn.prompts)
        counts["num_samples"] += len(out.samples)
        counts["num_dropped"] = drawn.num_dropped
        records = []
        for i, prompt in enumerate(drawn.prompts):
            group = slice(i * size, (i + 1) * size)
            kept, why = select(self._config, out.samples[group], out.scores[group])
            for reason in why:
                counts[reason] += 1
            counts["num_kept"] += len(kept)
            counts["num_unsolved"] += not kept
            pairs = [(out.samples[group][k], out.scores[group][k]) for k in kept]
            records += [self._record(prompt.example, *pair) for pair in pairs]
        return records, {"position": drawn.position, "counts": counts}

    def _record(self, example: Example, sample: Sample, score: Score) -> dict[str, Any]:
        own = demonstration(self._responses.written(example), sample.completion) | {
            "reward": score.value, "parts": dict(score.parts), "num_tokens": sample.num_tokens,
        }  # fmt: skip
        reference = {} if example.reference is None else {"reference": example.reference}
        fields = {k: v for k, v in {**example.fields, **reference}.items() if k not in own}
        return own | json.loads(to_json(fields))

    def finish(self, state: State, records: Iterable[dict[str, Any]], run_dir: Path) -> str:
        """Writes reject.json, and balanced.jsonl where it is asked for."""
        figures: dict[str, Any] = dict(state["counts"])
        said = [f"{n} {_meaning(name)}" for name, n in figures.items() if n or name == "num_kept"]
        if (field := self._config.balance) is not None:
            chosen, by_value = balanced(list(records), field, self._config.seed)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in chosen]
            replace_file(run_dir / BALANCED, "".join(lines).encode(errors="backslashreplace"))
            figures |= {"num_balanced": len(chosen), "num_kept_by_value": by_value}
            said.append(f"{len(chosen)} of the kept in {BALANCED}, equally many of each {field}")
        replace_file(run_dir / FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
        return "; ".join(said)

    def close(self) -> None:
        self._responses.close()


class Distinct:
    """A source of examples in which no prompt comes twice: the first record of each stays."""

    def __init__(self, source: Examples):
        self._source = source
        first: dict[str, int] = {}
        for index in range(len(source)):
            example = source[index]
            first.setdefault(to_json([example.prompt, example.messages]), index)
        self._places = list(first.values())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._places[index]]

    def where(self, index: int) -> str:
        return self._source.where(self._places[index])


def select(
    config: RejectConfig, samples: Sequence[Sample], scores: Sequence[Score]
) -> tuple[list[int], list[str]]:
    """Which completions of one prompt are kept, the best first; and why each of the others is not,
    as a key of `COUNTS`.

    Raises:
      UserError: if a completion with a score has no part that `keep` names.
    """
    why = []
    passed: list[int] = []
    for i, (sample, score) in enumerate(zip(samples, scores, strict=True)):
        reason = rejected(config, sample, score)
        if reason is None:
            passed.append(i)
        else:
            why.append(reason)
    passed.sort(key=lambda i: -(scores[i].value or 0.0))  # Stable: of equals the first sampled.
    distinct: dict[str, int] = {}
    for i in passed:
        distinct.setdefault(" ".join(samples[i].completion.split()), i)
    kept = list(distinct.values())[: config.max_per_prompt]
    why += ["num_duplicates"] * (len(passed) - len(distinct))
    why += ["num_over"] * (len(distinct) - len(kept))
    return kept, why


def rejected(config: RejectConfig, sample: Sample, score: Score) -> str | None:
    """Why a completion is not good enough, whatever the others are; None if it is."""
    if score.value is None:
        return "num_failed_rewards"
    if sample.is_truncated:
        return "num_truncated"
    if not sample.completion.strip():
        return "num_empty"
    rewards = names_for(config.rewards.by_name, sample.fields)
    for name, threshold in config.keep.items():
        if name.partition("/")[0] not in rewards:
            continue
        if name not in score.parts:
            raise UserError(
                f"keep: no reward gave a part {name!r}; there are {', '.join(score.parts)}"
            )
        if not threshold.holds(score.parts[name]):
            return BELOW + name
    return None


def balanced(
    records: Sequence[Mapping[str, Any]], field: str, seed: int
) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """As many records of each value of a field as of the value with the fewest, drawn by `seed`, in
    the order in which they came; and how many there were of each value."""
    places = collections.defaultdict(list)
    for place, record in enumerate(records):
        places[json.dumps(record[field], sort_keys=True)].append(place)
    least = min(map(len, places.values()), default=0)
    chosen: list[int] = []
    for number, value in enumerate(sorted(places)):
        draw = np.random.default_rng([seed, number])
        chosen += draw.permutation(places[value])[:least].tolist()
    return [records[i] for i in sorted(chosen)], {k: len(v) for k, v in sorted(places.items())}


def _meaning(name: str) -> str:
    return COUNTS[BELOW] + name.removeprefix(BELOW) if name.startswith(BELOW) else COUNTS[name]
