"""The loop around a phase of two numbers: what is written when, and resuming from anywhere."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import Terminated, UserError
from alignjax.core.types import Weighted
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.loop import Collected, Evaluated, LoopConfig, StopRunError, evaluated, train
from alignjax.train.metrics import TIMINGS, MetricWriter, read_metrics
from alignjax.train.optim import OptimizerConfig, averaged, make_optimizer
from alignjax.train.progress import Progress
from alignjax.train.state import create_state
from alignjax.train.step import make_step

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.1), 100)


def loss_fn(params, batch):
    error = jnp.where(batch["mask"], params["w"] - batch["x"], 0.0)
    return Weighted(jnp.sum(error**2), jnp.sum(batch["mask"], dtype=jnp.float32)), {}


STEP = make_step(loss_fn, OPTIMIZER)


class Numbers:
    """Records: 0, 1, 2, ... from the last one's place on."""

    def __init__(self):
        self.next = 0

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


class Fake:
    """Takes two numbers per iteration, in as many updates, and draws from the key of the state."""

    def __init__(self, events=None, at=None, num_updates=2):
        self.seen, self.num_evaluations, self.exported = [], [], None
        self.events, self.at, self.num_updates = events, at, num_updates

    def init(self, key):
        return create_state({"w": jnp.zeros(2)}, OPTIMIZER.transform, key)

    def records(self):
        return Numbers()

    def collect(self, state, records):
        step = int(state.step)
        self.seen.append((step, records.next))
        first, records.next = records.next, records.next + 2
        if self.at == step:
            self.events()
        noise = jax.random.normal(jax.random.fold_in(state.key, step), (1, 1, 2))
        batches = [
            {"x": noise + first + i, "mask": np.ones((1, 1, 2), bool)}
            for i in range(self.num_updates)
        ]
        return state, Collected(
            batches, num_tokens=first + 1, metrics={"first": float(first)},
            samples=[{"text": f"{step}.{i}"} for i in range(6)],
            warnings=["look out"] if step == 3 else [],
        )  # fmt: skip

    def step(self, state, batch):
        return STEP(state, batch)

    def evaluate(self, state):
        self.num_evaluations.append(int(state.step))
        return Evaluated({"eval/w": float(state.params["w"][0])}, [{"text": "eval"}])

    def diagnose(self, metrics):
        return [f"w is odd at {metrics['first']:g}"] if metrics["first"] == 4 else []


class Heard(Progress):
    def __init__(self):
        super().__init__()
        self.warnings, self.notes = [], []

    def warn(self, text):
        self.warnings.append(text)

    def note(self, text):
        self.notes.append(text)


def config(**changes):
    return LoopConfig(**{"steps": 7, "checkpoint_every": 3, "tensorboard": False, **changes})


def run(run_dir, phase=None, progress=None, **changes):
    return train(
        phase or Fake(), config(**changes), run_dir, seed=1, progress=progress or Heard(),
        resume_command="alignjax run x",
    )  # fmt: skip


def files(run_dir):
    metrics = [
        {k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(run_dir)
    ]
    return metrics, (run_dir / "samples.jsonl").read_text()


def assert_same(run_dir, state, reference_dir, reference):
    jax.tree.map(np.testing.assert_array_equal, state, reference)
    assert files(run_dir) == files(reference_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, jax.device_get(run(run_dir))


def test_what_is_written_and_when(tmp_path):
    phase, heard = Fake(), Heard()
    state = run(tmp_path, phase, heard, log_every=2, eval_every=3, num_samples=2)
    assert int(state.step) == 7
    assert phase.seen == [(i, 2 * i) for i in range(7)]
    assert phase.num_evaluations == [0, 3, 6, 7]
    lines = {line["step"]: line for line in read_metrics(tmp_path)}
    assert list(lines) == [0, 2, 3, 4, 6, 7]
    assert lines[0].keys() == lines[3].keys() == {"step", "eval/w"}
    training = {
        "loss", "grad_norm", "learning_rate", "num_skipped_updates", "first", "num_tokens",
        "step_time", "tokens_per_second",
    }  # fmt: skip
    assert lines[2].keys() == {"step", *training}
    assert lines[6].keys() == {"step", "eval/w", *training}
    assert [lines[i]["num_tokens"] for i in (2, 4, 6, 7)] == [4, 16, 36, 49]
    assert lines[4]["first"] == 6
    samples = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    seen = [(s["step"], s["text"]) for s in samples]
    evals = [(i, "eval") for i in (0, 3, 6, 7)]
    assert sorted(seen) == sorted(
        [(i, f"{i - 1}.{g}") for i in (2, 4, 6, 7) for g in range(2)] + evals
    )
    assert heard.warnings == ["step 4: look out"], "diagnosed on logged iterations only"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


def test_warnings_name_the_step(tmp_path):
    heard = Heard()
    run(tmp_path, progress=heard)
    assert heard.warnings == ["step 3: w is odd at 4", "step 4: look out"]


def test_metrics_are_means_over_updates_and_counts_are_sums(tmp_path):
    class Logged(Fake):
        def step(self, state, batch):
            state, metrics = super().step(state, batch)
            metrics |= {"a": jnp.float32(self.n), "sampling/a": jnp.float32(self.n)}
            metrics["num_skipped_updates"] = jnp.float32(self.n < 4)
            self.n += 1
            return state, metrics

        n = 0

    run(tmp_path, Logged(num_updates=4), steps=2)
    _, first, second = read_metrics(tmp_path)
    assert (first["a"], first["sampling/a"], first["num_skipped_updates"]) == (1.5, 0.0, 4.0)
    assert (second["a"], second["sampling/a"], second["num_skipped_updates"]) == (5.5, 4.0, 0.0)


def test_the_time_of_evaluations_is_not_that_of_steps(tmp_path):
    class Slow(Fake):
        def collect(self, state, records):
            time.sleep(0.05)
            return super().collect(state, records)

        def evaluate(self, state):
            time.sleep(0.8)
            return super().evaluate(state)

    run(tmp_path / "warm", steps=1)
    run(tmp_path, Slow(), steps=4, log_every=4, eval_every=2, checkpoint_every=9)
    last = read_metrics(tmp_path)[-1]
    assert 0.05 <= last["step_time"] < 0.2, "0.05 s of sleep; 0.25 with a share of an evaluation"
    assert last["tokens_per_second"] == pytest.approx(16 / (4 * last["step_time"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_signal_saves_says_how_to_go_on_and_goes_on_exactly(tmp_path, whole, number, at):
    heard = Heard()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path, Fake(lambda: os.kill(os.getpid(), number), at), heard)
    assert isinstance(stopped.value, Terminated) == (number == signal.SIGTERM)
    assert heard.notes == [f"saved step {at + 1}; alignjax run x continues from there"]
    assert signal.getsignal(number) is before
    heard, phase = Heard(), Fake()
    state = run(tmp_path, phase, heard)
    assert heard.notes == [f"resumed from step {at + 1} of 7"]
    assert phase.seen[0] == (at + 1, 2 * at + 2)
    assert phase.num_evaluations == [7], "the first evaluation is not repeated"
    assert_same(tmp_path, state, *whole)


def test_a_second_ctrl_c_ends_at_once_and_loses_only_what_was_not_saved(tmp_path, whole):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("still there")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(twice, at=4))
    phase = Fake()
    state = run(tmp_path, phase)
    assert phase.seen[0] == (3, 6)
    assert_same(tmp_path, state, *whole)


def test_sigterm_twice_is_once(tmp_path, whole):
    """A scheduler's, and the same by way of the script that it started."""

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    heard = Heard()
    with pytest.raises(Terminated):
        run(tmp_path, Fake(twice, at=4), heard)
    assert heard.notes == ["saved step 5; alignjax run x continues from there"]
    assert_same(tmp_path, run(tmp_path), *whole)


def test_the_watchdog_of_the_loop_shows_where_a_step_hangs(tmp_path, capfd):
    def hang_here():
        time.sleep(0.7)

    run(tmp_path, Fake(hang_here, at=3), watchdog_minutes=0.3 / 60)
    text = (tmp_path / "stacks.0.txt").read_text()
    assert "in hang_here" in text and "in collect" in text and "(the last: 3)" in text
    assert "in hang_here" in capfd.readouterr().err


def test_a_signal_in_the_last_iteration_lets_no_further_stage_begin(tmp_path, whole):
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(lambda: os.kill(os.getpid(), signal.SIGTERM), at=6), heard)
    assert heard.notes == ["saved step 7; alignjax run x continues from there"]
    phase = Fake()
    assert_same(tmp_path, run(tmp_path, phase), *whole)
    assert phase.seen == []


def interrupt_evaluation(at):
    class Interrupted(Fake):
        def evaluate(self, state):
            if int(state.step) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().evaluate(state)

    return Interrupted()


def test_a_signal_in_the_last_evaluation_is_not_forgotten(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt_evaluation(7))
    assert_same(tmp_path, run(tmp_path), *whole)


def test_a_signal_in_the_first_evaluation_leaves_nothing_to_continue(tmp_path, whole):
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt_evaluation(0), heard)
    assert heard.notes == ["stopped before the first step; alignjax run x continues from there"]
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert_same(tmp_path, run(tmp_path), *whole)


def test_the_first_signal_says_that_it_was_heard(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Fake(lambda: os.kill(os.getpid(), signal.SIGINT), at=2))
    assert capfd.readouterr().err.count("finishing this step, then saving") == 1


def stop(kind=StopRunError):
    def act():
        raise kind("9 of 9 samples have no reward")

    return act


@pytest.mark.parametrize("kind", [StopRunError, UserError])
@pytest.mark.parametrize("at", [2, 3, 5])
def test_when_nothing_can_be_collected_the_place_before_is_saved(tmp_path, whole, at, kind):
    """Whether or not that step (3) was just saved; the data read in vain are read again."""
    with pytest.raises(StopRunError) as caught:
        run(tmp_path, Fake(stop(kind), at))
    assert str(caught.value) == (
        f"9 of 9 samples have no reward\nstopped in step {at + 1}; step {at} is saved, and "
        "alignjax run x continues from there"
    )
    phase = Fake()
    state = run(tmp_path, phase)
    assert phase.seen[0] == (at, 2 * at)
    assert_same(tmp_path, state, *whole)


def test_a_run_that_fails_before_its_first_step_leaves_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"^9 of 9 samples have no reward$"):
        run(tmp_path, Fake(stop(), 0))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_any_other_error_loses_only_what_was_not_saved(tmp_path, whole):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Fake(stop(ZeroDivisionError), 5))
    assert read_metrics(tmp_path)[-1]["step"] == 5
    phase = Fake()
    state = run(tmp_path, phase)
    assert phase.seen[0] == (3, 6)
    assert_same(tmp_path, state, *whole)


def test_killed_while_writing_a_line(tmp_path, whole):
    """As kill -9 leaves it: lines beyond the checkpoint, the last one cut."""
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Fake(stop(ZeroDivisionError), 5))
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-5])
    assert_same(tmp_path, run(tmp_path), *whole)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, whole):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Fake(stop(ZeroDivisionError), 2))
    phase = Fake()
    state = run(tmp_path, phase)
    assert phase.seen[0] == (0, 0) and phase.num_evaluations == [0, 7]
    assert_same(tmp_path, state, *whole)


def test_a_damaged_last_checkpoint_costs_a_warning_and_some_steps(tmp_path, whole):
    run_dir, _ = whole
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    for file in Path(tmp_path / "checkpoints" / "7" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 50:
            file.write_bytes(file.read_bytes()[:-1])
    phase, heard = Fake(), Heard()
    state = run(tmp_path, phase, heard)
    assert phase.seen == [(6, 12)]
    assert len(heard.warnings) == 1 and "checkpoints/7 is damaged" in heard.warnings[0]
    assert heard.notes == ["resumed from step 6 of 7"]
    assert_same(tmp_path, state, *whole)


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
    run_dir, reference = whole
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    phase = Fake()
    state = run(tmp_path, phase)
    assert phase.seen == phase.num_evaluations == []
    assert (tmp_path / "metrics.jsonl").read_text() == (run_dir / "metrics.jsonl").read_text()
    assert_same(tmp_path, state, run_dir, reference)


class Diverges(Fake):
    """Whose gradients are not finite in some of its steps."""

    def __init__(self, *steps):
        super().__init__()
        self.steps = steps

    def collect(self, state, records):
        state, collected = super().collect(state, records)
        if int(state.step) + 1 in self.steps:
            for batch in collected.batches:
                batch["x"] = batch["x"] * np.nan
        return state, collected


def test_a_diverged_run_stops_with_advice_and_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"step 6: the gradient was not finite in 5 .* lower"):
        run(tmp_path, Diverges(*range(2, 20)), steps=20)
    assert read_metrics(tmp_path)[-1]["loss"] is None
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_short_run_that_never_learned_is_no_success(tmp_path):
    with pytest.raises(UserError, match=r"step 3: the gradient was not finite in 3 "):
        run(tmp_path, Diverges(1, 2, 3), steps=3)


def test_steps_that_go_wrong_now_and_then_are_survived(tmp_path):
    run(tmp_path, Diverges(1, 2, 3, 5, 6, 7), steps=8)


@pytest.mark.parametrize(("name", "there"), [("eval/v", "eval/w"), ("w", "loss")])
def test_a_best_metric_that_does_not_exist_is_told_at_once(tmp_path, name, there):
    phase = Fake()
    with pytest.raises(UserError, match=f"best_metric: there is no metric '{name}'.*{there}"):
        run(tmp_path, phase, best_metric=name)
    assert len(phase.seen) <= 1


def test_lines_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    events = []
    save, sync = Checkpointer.save, MetricWriter.sync
    monkeypatch.setattr(
        Checkpointer, "save", lambda *a, **k: (events.append("save"), save(*a, **k))
    )
    monkeypatch.setattr(MetricWriter, "sync", lambda *a: (events.append("sync"), sync(*a)))
    run(tmp_path)
    assert events == ["sync", "save"] * 3


def test_an_iteration_without_an_update_is_an_iteration(tmp_path):
    """Such as one in which no group told good from bad."""
    phase = Fake(num_updates=0)
    state = run(tmp_path, phase)
    assert int(state.step) == 7
    np.testing.assert_array_equal(state.params["w"], np.zeros(2))
    assert "loss" not in read_metrics(tmp_path)[3]


def test_evaluations_are_of_the_average_where_there_is_one(tmp_path):
    """With schedule_free; gradients are taken at another point, which the state holds."""
    optimizer = make_optimizer(OptimizerConfig(name="schedule_free", learning_rate=0.1), 14)
    step = make_step(loss_fn, optimizer)

    class Averaging(Fake):
        def init(self, key):
            return create_state({"w": jnp.zeros(2)}, optimizer.transform, key)

        def step(self, state, batch):
            return step(state, batch)

    state = run(tmp_path, Averaging())
    (seen,) = (line["eval/w"] for line in read_metrics(tmp_path) if line.get("eval/w"))
    average = averaged(state.params, state.opt_state)
    assert seen == float(average["w"][0]) == float(evaluated(state).params["w"][0])
    assert abs(seen - float(state.params["w"][0])) > 1e-3
    # A checkpoint gives it, too, without the rest of the state.
    parts = {"params": state.params, "opt_state": state.opt_state}
    checkpoints = Checkpointer(tmp_path / "checkpoints", keep=1, read_only=True)
    _, found = checkpoints.restore_parts(parts)
    checkpoints.close()
    np.testing.assert_array_equal(averaged(**found)["w"], average["w"])


def test_the_best_checkpoint_is_kept(tmp_path):
    """w follows the numbers up, so the smallest is that of step 2."""
    run(tmp_path, eval_every=2, checkpoint_every=2, keep=1, best_metric="eval/w")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "7"]
    checkpoints = Checkpointer(tmp_path / "checkpoints", keep=1, read_only=True)
    step, found = checkpoints.restore_parts({"params": {"w": jnp.zeros(2)}}, 2)
    checkpoints.close()
    by_step = {line["step"]: line.get("eval/w") for line in read_metrics(tmp_path)}
    assert (step, float(found["params"]["w"][0])) == (2, by_step[2])
