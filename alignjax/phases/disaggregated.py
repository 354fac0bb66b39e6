"""When an iteration is sampled: in turn with training, or ahead of it on devices of its own.

Ahead, iteration t is sampled by the weights that have seen t - max_staleness iterations, never by
others, however fast either side is: so a run can be repeated, and continued, bit for bit. What is
in flight when a checkpoint is saved is not in it. The weights that sample it are
(`TrainState.behaviour`), as are the key and the position of its prompts, and a run that continues
samples it again. To save what was sampled instead, each save would have to wait for the sampler.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from alignjax.core.types import Params
from alignjax.phases.grpo_config import RlConfig
from alignjax.phases.rollouts import Sampler
from alignjax.rewards.rollout import Rollouts
from alignjax.train.state import TrainState

SampleFn = Callable[[Params, Any, np.ndarray, int], list[Rollouts]]
"""What trains of the policy, records of prompts, key of the run, iteration -> its rollouts."""


class Schedule(Protocol):
    """Rollouts for one iteration after another."""

    def begin(self, state: TrainState, params: Params) -> TrainState:
        """The state before the first step, with what sampling needs of it.

        Args:
          params: what trains of the policy.
        """
        ...

    def records(self, records: Any) -> Any:
        """Records as `__call__` takes them; their position is that of the next iteration."""
        ...

    def __call__(
        self, state: TrainState, params: Params, records: Any
    ) -> tuple[TrainState, list[Rollouts]]:
        """The rollouts of the iteration that `state.step` says.

        Args:
          params: what trains of the policy, after the iterations before.
        """
        ...

    def close(self) -> None:
        """Ends what is in flight; no state of this run can go on from here."""
        ...


def make_schedule(config: RlConfig, sampler: Sampler, sample: SampleFn) -> Schedule:
    """Args: sample: of one iteration, by `sampler`."""
    limits = config.rollout
    if not limits.is_apart:
        return InTurn(sample)
    return Ahead(sampler, sample, limits.max_staleness, config.loop.steps)


class InTurn:
    """Implements `Schedule`: what trains samples."""

    def __init__(self, sample: SampleFn):
        self._sample = sample

    def begin(self, state: TrainState, params: Params) -> TrainState:
        return state

    def records(self, records: Any) -> Any:
        return records

    def __call__(
        self, state: TrainState, params: Params, records: Any
    ) -> tuple[TrainState, list[Rollouts]]:
        step, key = state.on_host()
        return state, self._sample(params, records, key, step)

    def close(self) -> None:
        pass


class Position(NamedTuple):
    """Of records, between two iterations."""

    state: dict[str, Any]
    epoch: float
    num_dropped: int


class ReadAhead:
    """Records that a thread reads (`ahead`) for iterations to come; all else is as of the one that
    was delivered last."""

    def __init__(self, records: Any):
        self.ahead = records
        self.delivered = self.position()

    def position(self) -> Position:
        """Of the thread."""
        records = self.ahead
        return Position(records.get_state(), records.epoch, records.num_dropped)

    @property
    def epoch(self) -> float:
        return self.delivered.epoch

    @property
    def num_dropped(self) -> int:
        return self.delivered.num_dropped

    def get_state(self) -> dict[str, Any]:
        return self.delivered.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.ahead.set_state(state)
        self.delivered = self.position()


class Job(NamedTuple):
    """An iteration that is sampled ahead."""

    weights: Future[Params]
    found: Future[tuple[list[Rollouts], Position]]


class Ahead:
    """Implements `Schedule`: a thread samples, on devices that do not train, `max_staleness`
    iterations ahead; with 0 training waits for it."""

    def __init__(self, sampler: Sampler, sample: SampleFn, max_staleness: int, num_steps: int):
        self._sampler, self._sample = sampler, sample
        self._max_staleness, self._num_steps = max_staleness, num_steps
        self._in_flight: deque[Job] = deque()
        self._next: tuple[int, Any] | None = None

    def begin(self, state: TrainState, params: Params) -> TrainState:
        weights = self._sampler.weights
        kept = weights.kept(params, weights.push(params).result()) if self._max_staleness else None
        return state._replace(behaviour=(kept,) * self._max_staleness)

    def records(self, records: Any) -> ReadAhead:
        return ReadAhead(records)

    def __call__(
        self, state: TrainState, params: Params, records: ReadAhead
    ) -> tuple[TrainState, list[Rollouts]]:
        step, key = state.on_host()
        if self._next is None or self._next[0] != step or self._next[1] is not records:
            self._restart(state.behaviour, records, key, step)
        self._next = None  # Until all has gone well.
        weights = self._sampler.weights
        pushed = weights.push(params)
        self._submit(pushed, records, key, step + self._max_staleness, version=step)
        rounds, records.delivered = self._in_flight.popleft().found.result()
        self._next = step + 1, records
        here = pushed.result()
        if self._max_staleness:
            kept = weights.kept(params, here)
            state = state._replace(behaviour=(*state.behaviour, kept)[1:])
        return state, rounds

    def _restart(
        self, behaviour: Sequence[Params], records: ReadAhead, key: np.ndarray, step: int
    ) -> None:
        """Samples what is in flight at `step`, from where the records are then."""
        self._drop()
        records.set_state(records.get_state())
        for ahead, weights in enumerate(behaviour):
            version = max(0, step + ahead - self._max_staleness)
            self._submit(
                self._sampler.weights.push(weights), records, key, step + ahead, version=version
            )

    def _submit(
        self,
        weights: Future[Params],
        records: ReadAhead,
        key: np.ndarray,
        step: int,
        *,
        version: int,
    ) -> None:
        def sample() -> tuple[list[Rollouts], Position]:
            rounds = self._sample(weights.result(), records.ahead, key, step)
            rounds = [dataclasses.replace(r, version=version) for r in rounds]
            return rounds, records.position()

        if step < self._num_steps:
            self._in_flight.append(Job(weights, self._sampler.devices.submit(sample)))

    def _drop(self) -> None:
        for job in self._in_flight:
            job.found.cancel()
        self._sampler.devices.submit(lambda: None).result()  # When what has begun is done.
        self._in_flight.clear()

    def close(self) -> None:
        # Without its weights the sampler ends within a few tokens: a process that is to stop may
        # have seconds, and a round of sampling minutes to go. Of several processes each would end
        # at another token, and wait for the others.
        if jax.process_count() == 1:
            for job in self._in_flight:
                jax.tree.map(lambda array: array.delete(), job.weights.result())
        self._sampler.devices.close()


def staleness_metrics(rounds: Sequence[Rollouts], step: int) -> dict[str, float]:
    """By how many iterations the weights that sampled a token were behind those that are trained on
    it; nothing where the former are not known (`InTurn`: they are the same).

    Args:
      step: iterations that the latter have seen.
    """
    found = [
        (r.completions.lengths.sum(), step - r.version) for r in rounds if r.version is not None
    ]
    if not found:
        return {}
    num_tokens, staleness = np.transpose(found)
    return {
        "rollout/staleness/mean": float(np.average(staleness, weights=num_tokens)),
        "rollout/staleness/max": float(staleness.max()),
    }
