"""Checkpoints: which are kept, what damage does, and what is said about it."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.optim import OptimizerConfig, make_optimizer
from alignjax.train.state import create_state

TRANSFORM = make_optimizer(OptimizerConfig(), 10).transform


def state_of(step, layers=("w",), width=3, dtype=jnp.float32):
    params = {name: jnp.full((2, width), step, dtype) for name in layers}
    state = create_state(params, TRANSFORM, jax.random.PRNGKey(step))
    return state._replace(step=jnp.int32(step))


@contextlib.contextmanager
def opened(tmp_path, **options):
    checkpoints = Checkpointer(tmp_path / "checkpoints", **{"keep": 2, **options})
    with contextlib.closing(checkpoints):
        yield checkpoints


def save(tmp_path, steps, metrics=None, **options):
    with opened(tmp_path, **options) as checkpoints:
        for step in steps:
            known = None if metrics is None else {"eval/loss": metrics[step]}
            checkpoints.save(step, state_of(step), {"at": step}, known)
        checkpoints.wait()


def restore(tmp_path, template=None, **options):
    said = []
    with opened(tmp_path, **options) as checkpoints:
        return checkpoints.restore(template or state_of(0), warn=said.append), said


def steps_on_disk(tmp_path):
    return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())


def files_of(tmp_path, step):
    return sorted(p for p in (tmp_path / "checkpoints" / str(step)).rglob("*") if p.is_file())


def largest_file(tmp_path, step):
    return max(files_of(tmp_path, step), key=lambda p: p.stat().st_size)


def assert_is_step(restored, step):
    assert restored is not None and (restored[0], restored[2]) == (step, {"at": step})
    jax.tree.map(np.testing.assert_array_equal, restored[1], state_of(step))
    assert isinstance(restored[1], type(state_of(0)))


def test_nothing_saved_is_no_fault(tmp_path):
    assert restore(tmp_path) == (None, [])


def test_the_newest_comes_back_as_it_was(tmp_path):
    save(tmp_path, [1, 2])
    restored, said = restore(tmp_path)
    assert_is_step(restored, 2)
    assert said == []


def test_the_template_is_deleted_so_that_no_two_states_are_on_the_devices(tmp_path):
    template, wrong = state_of(0), state_of(0, width=4)
    assert restore(tmp_path, template) == (None, [])
    save(tmp_path, [1, 2])
    with pytest.raises(UserError, match="another model"):
        restore(tmp_path, wrong)
    arrays = jax.tree.leaves((template, wrong))
    assert not any(array.is_deleted() for array in arrays)
    largest_file(tmp_path, 2).write_bytes(b"")
    assert_is_step(restore(tmp_path, template)[0], 1)
    assert all(array.is_deleted() for array in jax.tree.leaves(template))


def test_what_is_saved_is_the_state_of_then_though_it_is_donated_at_once(tmp_path):
    """Saving goes on in a thread while the next step overwrites the buffers."""
    advance = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    big = jnp.zeros((1500, 1500))
    with opened(tmp_path, keep=9) as checkpoints:
        for step in range(3):
            checkpoints.save(step, {"params": {"big": big}}, {})
            for _ in range(3):
                big = advance(big)
        checkpoints.wait()
        for step in range(3):
            _, found = checkpoints.restore_parts({"params": {"big": big}}, step)
            np.testing.assert_array_equal(found["params"]["big"], np.full((1500, 1500), 3.0 * step))


@pytest.mark.parametrize("mode, best", [("min", 2), ("max", 3)])
def test_the_last_and_the_best_are_kept_even_over_a_restart(tmp_path, mode, best):
    losses = {1: 3.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0}
    options = {"best_metric": "eval/loss", "best_mode": mode}
    save(tmp_path, [1, 2, 3, 4], losses, **options)
    assert steps_on_disk(tmp_path) == sorted({best, 3, 4})
    save(tmp_path, [5, 6], losses, **options)
    assert steps_on_disk(tmp_path) == [best, 5, 6]
    with opened(tmp_path, **options) as checkpoints:
        # Between evaluations there is no metric: such a checkpoint is no best one.
        checkpoints.save(7, state_of(7), {"at": 7}, {"loss": 0.0})
        # Nor is one whose metric is not a number.
        checkpoints.save(8, state_of(8), {"at": 8}, {"eval/loss": float("nan")})
        for step in (9, 10):
            checkpoints.save(step, state_of(step), {"at": step}, {"eval/loss": 2.0})
        checkpoints.wait()
    assert steps_on_disk(tmp_path) == [best, 9, 10]


def test_only_the_last_are_kept_without_a_metric(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep=3)
    assert steps_on_disk(tmp_path) == [2, 3, 4]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, what",
    [(truncate, "has changed"), (flip_a_bit, "has changed"), (lambda p: p.unlink(), "is missing")],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(tmp_path, damage, what):
    save(tmp_path, [1, 2, 3], keep=3)
    damage(largest_file(tmp_path, 3))
    restored, said = restore(tmp_path, keep=3)
    assert_is_step(restored, 2)
    (sentence,) = said
    assert re.search(rf"checkpoints/3 is damaged \(.*{what}.*\); trying the one before", sentence)
    assert steps_on_disk(tmp_path) == [1, 2] and (tmp_path / "damaged-3").is_dir()
    # Its step is taken again, saved again, and what is damaged then is set aside as well.
    save(tmp_path, [3], keep=3)
    restored, said = restore(tmp_path, keep=3)
    assert_is_step(restored, 3)
    damage(largest_file(tmp_path, 3))
    restored, _ = restore(tmp_path, keep=3)
    assert_is_step(restored, 2)
    assert (tmp_path / "damaged-3-2").is_dir()


def test_any_file_that_orbax_reads_is_looked_at(tmp_path):
    """Each file alone is damaged. Where nothing is said, what comes back is right all the same."""
    save(tmp_path, [1, 2])
    noticed = 0
    for path in files_of(tmp_path, 2):
        original = path.read_bytes()
        path.write_bytes(original[: len(original) // 2])
        restored, said = restore(tmp_path)
        assert_is_step(restored, 1 if said else 2)
        if said:
            noticed += 1
            (tmp_path / "damaged-2").rename(tmp_path / "checkpoints" / "2")
        path.write_bytes(original)
    assert noticed >= len(files_of(tmp_path, 2)) - 2  # All but the two markers of Orbax.


def test_all_damaged_is_an_error_and_nothing_is_moved(tmp_path):
    save(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(largest_file(tmp_path, step))
    with pytest.raises(UserError, match="all 2 checkpoints are damaged; restore a backup, or"):
        restore(tmp_path)
    assert steps_on_disk(tmp_path) == [1, 2]


def test_half_written_checkpoint_of_a_killed_process_is_cleaned_away(tmp_path):
    save(tmp_path, [1])
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir()
    restored, said = restore(tmp_path)
    assert_is_step(restored, 1)
    assert said == [] and steps_on_disk(tmp_path) == [1]


@pytest.mark.parametrize(
    "template, what",
    [
        (lambda: state_of(0, width=4), r"params.w: float32\[2, 3\] there, float32\[2, 4\] now"),
        (lambda: state_of(0, ("w", "z")), r"params.z: nothing there, float32\[2, 3\] now"),
        (lambda: state_of(0)._replace(params={}), r"params.w: float32\[2, 3\] there, nothing now"),
        (lambda: state_of(0, dtype=jnp.bfloat16), r"float32\[2, 3\] there, bfloat16\[2, 3\] now"),
    ],
)
def test_another_template_is_an_error_and_no_damage(tmp_path, template, what):
    save(tmp_path, [1, 2])
    with pytest.raises(UserError, match=rf"checkpoints/2 is of another model or .*{what}"):
        restore(tmp_path, template())
    assert steps_on_disk(tmp_path) == [1, 2]


def test_params_alone(tmp_path):
    def params_of(width=3):
        return {"params": state_of(0, width=width).params}

    save(tmp_path, [1, 2])
    with opened(tmp_path, read_only=True) as checkpoints:
        for asked, expected in ((None, 2), (1, 1), (2, 2)):
            step, found = checkpoints.restore_parts(params_of(), asked)
            assert step == expected
            assert [*found] == ["params"]
            np.testing.assert_array_equal(found["params"]["w"], np.full((2, 3), float(expected)))
        with pytest.raises(UserError, match="no checkpoint of step 7; there are 1, 2"):
            checkpoints.restore_parts(params_of(), 7)
        with pytest.raises(
            UserError, match=r"params.w: float32\[2, 3\] there, float32\[2, 9\] now"
        ):
            checkpoints.restore_parts(params_of(width=9))
        flip_a_bit(largest_file(tmp_path, 2))
        with pytest.raises(UserError, match=r"checkpoints/2 is damaged \("):
            checkpoints.restore_parts(params_of())
    assert steps_on_disk(tmp_path) == [1, 2]


def test_a_failure_to_save_is_raised_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    """A full disk must not look like a finished run."""

    def full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr("alignjax.train.checkpoint._checksums", full)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state_of(1), {"at": 1})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    monkeypatch.undo()
    assert restore(tmp_path) == (None, [])
