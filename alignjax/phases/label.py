"""Responses of a file, or of a model -> records of preferences, as a judge ranks them.

The file is what the labelling page exports, with the annotator "judge:NAME", so that labels of
people and of judges are mixed by naming both files, and told apart by annotator.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from alignjax.core import digest
from alignjax.core.config import to_dict
from alignjax.core.errors import UserError
from alignjax.phases.judges import open_judge
from alignjax.phases.label_agreement import agreement_with, judgements_of, same_task
from alignjax.phases.label_config import LabelConfig, SampledConfig
from alignjax.phases.produce import State
from alignjax.phases.sample import SampleResponses
from alignjax.phases.sample_config import SampleConfig
from alignjax.rewards.constitution import Principle
from alignjax.rewards.judge import Item, Pair, Verdict, place_bias
from alignjax.train.metrics import replace_file
from alignjax.web import Task, read_tasks

FIGURES = "label.json"
COUNTS = {
    "num_prompts": "prompts",
    "num_questions": "pairs or responses that were judged",
    "num_unparsable": "answers that could not be understood, repetitions included",
    "num_not_understood": "pairs or responses left out, as no answer could be understood",
    "num_failed": "pairs or responses left out, as no answer came",
    "num_left_out": "prompts left out, as not all of their responses were judged",
    "num_records": "records written",
}
"""What label.json counts."""


class Label:
    """Implements `phases.produce.DataPhase`."""

    output = "preferences.jsonl"
    shown = ("num_prompts", "num_records", "num_unparsable")

    def __init__(self, config: LabelConfig, mesh: Mesh):
        """Raises: UserError: if responses, model or judge cannot be read."""
        self._config = config
        self._source = _Sampled(config, mesh) if config.sample is not None else _Read(config)
        others = config.compare_with or config.responses
        self._others = {} if others is None else judgements_of(others, named=config.compare_with)
        chosen = config.constitution
        self._constitution = None if chosen is None else chosen.open()
        self._judge = open_judge(config.judge, mesh, Path(config.output_dir) / config.name)

    @property
    def warnings(self) -> list[str]:
        return []

    def init(self) -> State:
        return {
            "source": self._source.init(),
            "counts": dict.fromkeys(COUNTS, 0),
            "places": {"num": 0, "first": 0.0, "agree": 0.0},  # sums over pairs asked both ways
        }

    def produce(self, state: State) -> tuple[Sequence[Mapping[str, Any]], State] | None:
        found = self._source.next(state["source"])
        if found is None:
            return None
        tasks, source = found
        counts = dict(state["counts"])
        principles = self._drawn(counts["num_prompts"], len(tasks))
        verdicts = self._verdicts(tasks, principles)
        said = [verdict for of_task in verdicts for verdict in of_task]
        self._count(said, counts)
        counts["num_prompts"] += len(tasks)
        records = []
        for task, of_task, principle in zip(tasks, verdicts, principles, strict=True):
            record = self._record(task, of_task, principle)
            counts["num_left_out" if record is None else "num_records"] += 1
            records += [] if record is None else [record]
        bias, places = place_bias(said), dict(state["places"])
        if bias.num_pairs:
            places["num"] += bias.num_pairs
            places["first"] += bias.num_pairs * bias.first_is_better
            places["agree"] += bias.num_pairs * bias.orders_agree
        return records, {"source": source, "counts": counts, "places": places}

    def _drawn(self, first: int, num: int) -> list[Principle | None]:
        """The principle by which each prompt is judged, of which the first is number `first`."""
        if self._constitution is None:
            return [None] * num
        keys = (f"{self._config.seed}/{number}" for number in range(first, first + num))
        return [self._constitution.ordered(key)[0] for key in keys]

    def _verdicts(
        self, tasks: Sequence[Task], principles: Sequence[Principle | None]
    ) -> list[list[Verdict]]:
        """Of each task those of its pairs, in the order of `_pairs`, or of its responses."""
        if self._config.method == "pointwise":
            sizes = [len(task.responses) for task in tasks]
            items = [
                Item(task.prompt, text, record=task.fields)
                for task in tasks
                for text in task.responses
            ]
            said = iter(self._judge.pointwise(items))
        else:
            sizes = [len(_pairs(task)) for task in tasks]
            pairs = [
                Pair(
                    task.prompt,
                    task.responses[i],
                    task.responses[j],
                    {} if principle is None else {"question": principle.comparison},
                    task.fields,
                )
                for task, principle in zip(tasks, principles, strict=True)
                for i, j in _pairs(task)
            ]
            said = iter(self._judge.pairwise(pairs))
        return [list(itertools.islice(said, size)) for size in sizes]

    def _count(self, said: Sequence[Verdict], counts: dict[str, int]) -> None:
        """Raises UserError if too many have no verdict."""
        failed = [v.error for v in said if v.is_failed]
        lost = [v.error for v in said if v.value is None and not v.is_failed]
        config = self._config
        for errors, limit, name, what in (
            (failed, config.max_failure_frac, "max_failure_frac", "were not answered"),
            (lost, config.max_unparsable_frac, "max_unparsable_frac", "could not be understood"),
        ):
            if len(errors) > limit * len(said):
                raise UserError(
                    f"{len(errors)} of {len(said)} judgements {what}, more than {name}={limit:g} "
                    f"allows. The first: {errors[0]}. What was answered is kept: run again to go on"
                )
        counts["num_questions"] += len(said)
        counts["num_unparsable"] += sum(v.num_unparsable for v in said)
        counts["num_failed"] += len(failed)
        counts["num_not_understood"] += len(lost)

    def _record(
        self, task: Task, verdicts: Sequence[Verdict], principle: Principle | None
    ) -> dict[str, Any] | None:
        """The record of a task; None unless everything that was asked has a verdict."""
        values = [verdict.value for verdict in verdicts]
        if any(value is None for value in values):
            return None
        own: dict[str, Any] = {"prompt": task.prompt, "responses": list(task.responses)}
        if self._config.method == "pointwise":
            own["scores"] = values
        else:
            rates = win_rates(values, len(task.responses))  # type: ignore[arg-type]
            own["ranks"], own["win_rates"] = ranks(rates), rates
            if len(rates) == 2:
                own["preference_prob"] = max(rates)
        if principle is not None:
            own["principle"] = principle.name
        own["annotator"] = self._config.judge.annotator
        return own | {key: value for key, value in task.fields.items() if key not in own}

    def finish(self, state: State, records: Iterable[dict[str, Any]], run_dir: Path) -> str:
        """Writes label.json."""
        places, judge = state["places"], self._config.judge
        figures: dict[str, Any] = {
            **state["counts"],
            **self._source.figures(state["source"]),
            "annotator": judge.annotator,
            "judge": hashlib.sha256(self._judge.identity.encode()).hexdigest(),
            "templates": self._judge.template_digests,
        }
        if places["num"]:
            figures["first_is_preferred"] = places["first"] / places["num"]
            figures["orders_agree"] = places["agree"] / places["num"]
        if self._constitution is not None:
            figures["constitution"] = digest.of_value(to_dict(self._constitution))
        figures["agreement"] = agreement_with(self._others, records, judge.annotator)
        replace_file(run_dir / FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
        said = [f"{value} {COUNTS[name]}" for name, value in state["counts"].items() if value]
        if places["num"]:
            said.append(f"what stands first is preferred in {figures['first_is_preferred']:.1%}")
        for name, of in figures["agreement"].items():
            if of["num_pairs"]:
                said.append(f"of {of['num_pairs']} pairs {of['same_order']:.1%} as {name}")
        return "; ".join(said)

    def close(self) -> None:
        self._judge.close()


class _Read:
    """Tasks of a file, each set of responses once, so many at a time."""

    def __init__(self, config: LabelConfig):
        assert config.responses is not None
        specs = [config.responses] if isinstance(config.responses, str) else config.responses
        tasks = (task for spec in specs for task in read_tasks(spec))
        # A file of judgements has a record for each person.
        self._tasks = [*{same_task(t.prompt, t.responses): t for t in tasks}.values()]
        self._size = config.num_prompts

    def init(self) -> State:
        return {"position": 0}

    def next(self, state: State) -> tuple[Sequence[Task], State] | None:
        start = state["position"]
        tasks = self._tasks[start : start + self._size]
        return (tasks, {"position": start + len(tasks)}) if tasks else None

    def figures(self, state: State) -> dict[str, Any]:
        return {}


class _Sampled:
    """Tasks of `phase: sample`, batch by batch."""

    def __init__(self, config: LabelConfig, mesh: Mesh):
        assert config.sample is not None
        own = {name: getattr(config.sample, name) for name in SampledConfig.model_fields}
        made = SampleConfig(
            phase="sample", name=config.name, output_dir=config.output_dir, seed=config.seed,
            mesh=config.mesh, **own,
        )  # fmt: skip
        self._phase = SampleResponses(made, mesh)

    def init(self) -> State:
        return self._phase.init()

    def next(self, state: State) -> tuple[Sequence[Task], State] | None:
        found = self._phase.produce(state)
        if found is None:
            return None
        tasks = []
        for record in found[0]:
            fields = {k: v for k, v in record.items() if k not in ("prompt", "responses")}
            tasks.append(Task(record["prompt"], tuple(record["responses"]), fields))
        return tasks, found[1]

    def figures(self, state: State) -> dict[str, Any]:
        return {"sample": state["counts"]}


def _pairs(task: Task) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(task.responses)), 2))


def win_rates(values: Sequence[float], num_responses: int) -> list[float]:
    """Of each response the mean probability that it is better than another one of its prompt.

    Args:
      values: of the pairs (0, 1), (0, 2), ..., (1, 2), ...: that the first one is better.
      num_responses: K, at least 2.
    """
    better = np.zeros((num_responses, num_responses))
    for (i, j), p in zip(itertools.combinations(range(num_responses), 2), values, strict=True):
        better[i, j], better[j, i] = p, 1 - p
    return (better.sum(1) / (num_responses - 1)).tolist()


def ranks(rates: Sequence[float]) -> list[int]:
    """1 for the highest, 2 for the next one, ...; equal but for rounding is a tie."""
    levels = sorted({round(rate, 9) for rate in rates}, reverse=True)
    return [1 + levels.index(round(rate, 9)) for rate in rates]
