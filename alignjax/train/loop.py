"""A phase and a run directory -> a trained artifact: the one loop, resumable at any moment."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax import Array
from pydantic import Field

from alignjax.core.config import Config
from alignjax.core.errors import Terminated, UserError
from alignjax.core.processes import any_of, is_first
from alignjax.sharding import fetch, holders
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.metrics import MetricWriter, NoWriter
from alignjax.train.optim import averaged
from alignjax.train.progress import Progress
from alignjax.train.state import TrainState
from alignjax.train.step import Batch
from alignjax.train.watchdog import watchdog


class LoopConfig(Config):
    """How long to train, and what to write when. Unit: iterations: one `collect`, its updates."""

    steps: int = Field(1000, ge=1)
    """Iterations to train for."""
    log_every: int = Field(1, ge=1)
    """Iterations between lines of metrics.jsonl."""
    eval_every: int = Field(0, ge=0)
    """Iterations between evaluations, besides the ones before the first and after the last; 0 for
    those two alone."""
    checkpoint_every: int = Field(100, ge=1)
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: int = Field(2, ge=1)
    """How many of the last checkpoints to keep."""
    best_metric: str | None = None
    """Name of a metric, such as eval/loss, whose best checkpoint is kept as well."""
    best_mode: Literal["min", "max"] = "min"
    num_samples: int = Field(4, ge=0)
    """Samples written to samples.jsonl on each logged iteration, where the phase makes any."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Also logs to Weights & Biases, where it is installed."""
    watchdog_minutes: float | None = Field(None, gt=0)
    """Minutes without a finished step or evaluation after which each process writes the stacks of
    its threads to stderr and to stacks.PROCESS.txt, and goes on waiting: longer than the first
    step takes, which compiles. Not given: never."""


class Records(Protocol):
    """Training data with a position that is a JSON value."""

    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Collected:
    """What an iteration trains on, and what was seen while collecting it."""

    batches: Iterable[Batch]
    """One optimizer update each; numpy or device arrays [M, R, T]."""
    num_tokens: int
    """Tokens processed, prompts included and padding not."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()
    """Sentences for the user: what looks wrong, and the remedy."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation measured, under names that begin with eval/, and some of what it saw."""

    metrics: dict[str, float]
    samples: Sequence[Mapping[str, Any]] = ()


class StopRunError(UserError):
    """No iteration can follow: the loop saves what there is and says why."""


class Phase(Protocol):
    """What the loop needs of a phase, in the order in which it is used."""

    def init(self, key: Array) -> TrainState: ...
    def records(self) -> Records: ...
    def collect(self, state: TrainState, records: Records) -> tuple[TrainState, Collected]: ...
    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Array]]: ...
    def evaluate(self, state: TrainState) -> Evaluated: ...
    def diagnose(self, metrics: Mapping[str, float]) -> Sequence[str]:
        """Sentences on what looks wrong in the metrics of an iteration, each with the remedy."""
        ...

    def export(self, state: TrainState, path: Path) -> None: ...


def train(
    phase: Phase,
    config: LoopConfig,
    run_dir: Path,
    *,
    seed: int,
    progress: Progress,
    resume_command: str = "the same command",
) -> TrainState:
    """Trains from scratch or from the last whole checkpoint in the run directory, to the end.

    Between two iterations everything that changes is (state, position of the records); both are
    saved together, and metrics.jsonl and samples.jsonl are rewound to them on a restart. So a run
    that was killed at any moment continues as if it had not been, bit for bit.

    Raises:
      KeyboardInterrupt: after Ctrl-C, to any process, when the state is saved; also where it was
        the last step, so that no further stage begins. Terminated: the same, after SIGTERM.
      StopRunError: if the phase cannot collect data after some steps, when the state is saved.
      UserError: training has diverged.
    """
    state, records = phase.init(jax.random.PRNGKey(seed)), phase.records()
    checkpoints = Checkpointer(
        run_dir / "checkpoints",
        keep=config.keep,
        best_metric=config.best_metric,
        best_mode=config.best_mode,
        processes=holders(state),
    )
    step, num_tokens = 0, 0
    restored = checkpoints.restore(state, warn=progress.warn)
    if restored is not None:
        step, state, position = restored
        records.set_state(position["records"])
        num_tokens = position["num_tokens"]
        progress.note(f"resumed from step {step} of {config.steps}")
    writer: MetricWriter | NoWriter = NoWriter()
    if is_first():
        writer = MetricWriter(
            run_dir,
            last_step=step if restored is not None else -1,
            tensorboard=config.tensorboard,
            wandb_project=config.wandb_project,
            warn=progress.warn,
        )

    def position_now() -> dict[str, Any]:
        return {"records": records.get_state(), "num_tokens": num_tokens}

    def save(position: dict[str, Any], metrics: Mapping[str, float]) -> None:
        if checkpoints.latest_step() != step:
            writer.sync()
            checkpoints.save(step, state, position, metrics)

    best = config.best_metric
    failures, num_logged = 0, 0
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        _signals() as received,
        watchdog(config.watchdog_minutes, run_dir) as finished,
    ):

        def is_interrupted() -> bool:
            return any_of(bool(received))

        metrics: dict[str, float] = {}
        if restored is None:
            first = phase.evaluate(evaluated(state))
            if best is not None and best.startswith("eval/"):
                _check_best(best, first.metrics)
            writer.write(0, first.metrics, first.samples)
            progress.show(0, first.metrics)
        finished(step)
        watch = _Stopwatch()
        with progress.bar(step, config.steps) as advance:
            while step < config.steps and not is_interrupted():
                position = position_now()
                try:
                    state, collected = phase.collect(state, records)
                except UserError as stop:
                    # Nothing has been trained before the first step: a checkpoint would only tie
                    # the directory to a config that is about to be mended.
                    if step == 0:
                        raise
                    save(position, {})
                    checkpoints.wait()
                    raise StopRunError(
                        f"{stop}\nstopped in step {step + 1}; step {step} is saved, and "
                        f"{resume_command} continues from there"
                    ) from stop
                updates = []
                for batch in collected.batches:
                    state, update = phase.step(state, batch)
                    updates.append(update)
                state = state._replace(step=state.step + 1)
                step += 1
                is_last = step == config.steps
                is_logged = step % config.log_every == 0 or is_last
                num_tokens += collected.num_tokens
                watch.tokens += collected.num_tokens
                watch.steps += 1
                metrics = {}
                samples: list[Mapping[str, Any]] = []
                if is_logged:
                    metrics = {**collected.metrics, **_over_updates(updates)}
                    failures = failures + 1 if metrics.get("num_skipped_updates", 0) > 0 else 0
                    metrics |= watch.lap()
                    metrics["num_tokens"] = num_tokens
                    num_logged += 1
                    samples += collected.samples[: config.num_samples]
                    for warning in (*collected.warnings, *phase.diagnose(metrics)):
                        progress.warn(f"step {step}: {warning}")
                if is_last or (config.eval_every and step % config.eval_every == 0):
                    with watch.paused():
                        seen = phase.evaluate(evaluated(state))
                    metrics |= seen.metrics
                    samples += seen.samples
                if is_logged and best is not None and not best.startswith("eval/"):
                    _check_best(best, metrics)
                if metrics:
                    writer.write(step, metrics, samples)
                    progress.show(step, metrics)
                advance(step, metrics)
                finished(step)
                if failures >= 5 or (is_last and 0 < failures == num_logged):
                    checkpoints.wait()
                    raise UserError(
                        f"step {step}: the gradient was not finite in {failures} logged steps in a "
                        "row; lower optimizer.learning_rate or look for the cause with --debug"
                    )
                if is_last or step % config.checkpoint_every == 0:
                    save(position_now(), metrics)
        if is_interrupted() and step:
            save(position_now(), metrics)
        checkpoints.wait()
        if is_interrupted():
            done = f"saved step {step}" if step else "stopped before the first step"
            progress.note(f"{done}; {resume_command} continues from there")
            raise Terminated if any_of(signal.SIGTERM in received) else KeyboardInterrupt
    return state


def evaluated(state: TrainState) -> TrainState:
    """The state whose params are to be evaluated and exported; see `optim.averaged`."""
    return state._replace(params=averaged(state.params, state.opt_state))


def _check_best(name: str, metrics: Mapping[str, float]) -> None:
    if name not in metrics:
        known = ", ".join(metrics) or "none"
        raise UserError(f"loop.best_metric: there is no metric {name!r}; there are {known}")


def _over_updates(updates: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """The mean over the updates of an iteration; of counts, the sum. What compares the sampler with
    the trainer stands as it was at the first update: later ones move the policy on purpose."""
    host = fetch(list(updates))

    def combined(name: str) -> float:
        values = [update[name] for update in host]
        if name.startswith("sampling/"):
            return float(values[0])
        return float(np.sum(values) if name.startswith("num_") else np.mean(values))

    return {name: combined(name) for name in (host[0] if host else ())}


class _Stopwatch:
    """Seconds per iteration and tokens per second since the last lap, evaluations left out."""

    def __init__(self) -> None:
        self.tokens, self.steps = 0, 0
        self._start = time.perf_counter()

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        out = {
            "step_time": seconds / max(self.steps, 1),
            "tokens_per_second": self.tokens / seconds,
        }
        self.tokens, self.steps, self._start = 0, 0, now
        return out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM in a list, to be looked at between iterations; Ctrl-C after
    either ends the process at once. SIGTERM may come twice, from a scheduler and by way of a
    script: what is being saved is to be saved all the same."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        # Not by print, which the signal may have interrupted.
        os.write(2, b"\nfinishing this step, then saving; Ctrl-C stops at once\n")

    try:
        previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # Not in the main thread, as in some notebooks: signals stay as they are.
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
