"""On-policy distillation: its losses by hand, that it learns, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.types import LENGTH
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.online_distill import OnlineDistill
from alignjax.phases.online_distill_config import OnlineDistillConfig
from alignjax.phases.rollouts import sequence
from alignjax.recipes import chains
from alignjax.train.checkpoint import Checkpointer
from tests.phases import rl
from tests.phases.distillation import (
    STUDENT,
    assert_same,
    compiled_by_step,
    divergence,
    log_softmax,
    mesh_of,
    write_world,
)
from tests.phases.preferences import run

NUM_TOKENS = len(chains.TOKENS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "mine.py").write_text(
        "def threes(completion, **fields):\n    return completion.count('3') / 8\n"
    )
    return folder


def make(world, kind=None, data=None, sizes=(1, 1, 1), rollout=None, **changes):
    values = {
        "phase": "online_distill", "name": "x", "output_dir": str(world / "runs"),
        "model": {"init": STUDENT}, "tokenizer": str(world / "tokenizer"),
        "teacher": {"path": str(world / "teacher")},
        "divergence": kind or {},
        "data": {
            "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}}, **(data or {}),
        },
        "rollout": {"num_prompts": 8, "max_prompt_tokens": 16, "max_tokens": 8, **(rollout or {})},
        "evaluation": {"num_problems": 16, "num_samples": 2, "greedy": False},
        "optimizer": {"learning_rate": 1e-2},
        "loop": {"steps": 40},
        **changes,
    }  # fmt: skip
    return OnlineDistill(OnlineDistillConfig.model_validate(values), mesh_of(sizes))


def both(phase, params, rollouts):
    """Logits [N, V] of teacher and student where the sampled tokens are predicted, each completion
    in a row of its own, shifted by hand; the tokens [N]; their log-probs as sampled."""
    models = (phase._teacher.model, phase._teacher.params), (phase._policy.model, params)

    @jax.jit
    def logits(ids):
        rows = ids[None], jnp.ones_like(ids[None]), jnp.arange(len(ids))[None]
        return [m.logits(p, m.apply(p, *rows)[0])[0] for m, p in models]

    found, targets, logps = [], [], []
    for i in range(len(rollouts.samples)):
        one = sequence(rollouts, i)
        length, num = len(one["tokens"]), int(one["mask"].sum())
        ids = np.pad(one["tokens"], (0, 24 - length))
        found.append([np.asarray(z)[length - num - 1 : length - 1] for z in logits(ids)])
        targets += one["tokens"][-num:].tolist()
        logps += one["old_logps"][-num:].tolist()
    teachers, students = (np.concatenate(z) for z in zip(*found, strict=True))
    return teachers, students, np.array(targets), np.array(logps)


@pytest.mark.parametrize(
    ("kind", "group"),
    [({"kind": "jsd", "beta": 0.2, "temperature": 2.0}, 1), ({"kind": "sampled_reverse_kl"}, 2)],
)
def test_the_loss_and_what_is_measured_by_hand(world, kind, group):
    phase = make(world, kind, rollout={"temperature": 0.8, "group_size": group})
    state, records = phase.init(jax.random.PRNGKey(3)), phase.records()
    kept = rl.Kept(phase)
    state, collected = phase.collect(state, records)
    (batch,) = collected.batches
    params = jax.device_get(state.params)
    teachers, students, targets, logps = both(phase, params, kept.found[0])
    assert len(targets) == np.asarray(batch["mask"]).sum() > 20
    each = range(len(targets))
    if kind["kind"] == "jsd":
        log_t, log_s = (log_softmax(z[:, :NUM_TOKENS] / 2) for z in (teachers, students))
        expected = divergence("jsd", log_t, log_s, beta=0.2).mean()
    else:
        # All the teacher's entries: its log-prob of what was sampled is what it is.
        log_t, log_s = (log_softmax(z / 0.8)[each, targets] for z in (teachers, students))
        np.testing.assert_allclose(log_s, logps, atol=1e-5)
        expected = (log_s - log_t).mean()
    held_out = phase.evaluate(state).metrics
    _, step = phase.step(state, batch)
    assert step["loss"] == pytest.approx(expected, rel=1e-4)
    log_s = log_softmax(students / 0.8)
    assert step["entropy"] == pytest.approx(-(np.exp(log_s) * log_s).sum(1).mean(), rel=1e-4)
    assert step["sampling/sampling_logp_difference/max"] < 1e-4
    teachers, students, _, _ = both(phase, params, kept.found[1])
    log_t, log_s = (log_softmax(z[:, :NUM_TOKENS]) for z in (teachers, students))
    for name in ("forward_kl", "reverse_kl"):
        mean = divergence(name, log_t, log_s).mean()
        assert held_out[f"eval/sampled/{name}"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.slow
def test_a_step_moves_towards_what_the_teacher_likes_better(world):
    """And away from what it likes less."""
    phase = make(world, {"kind": "sampled_reverse_kl"}, optimizer={
        "learning_rate": 1e-3, "max_grad_norm": 1e9,
    })  # fmt: skip
    state, records = phase.init(jax.random.PRNGKey(3)), phase.records()
    kept = rl.Kept(phase)
    state, collected = phase.collect(state, records)
    (batch,) = collected.batches
    before = jax.device_get(state.params)
    state, _ = phase.step(state, batch)
    (rollouts,) = kept.found
    teachers, students, targets, _ = both(phase, before, rollouts)
    after = both(phase, jax.device_get(state.params), rollouts)[1]
    each = range(len(targets))
    log_t, log_s, log_after = (log_softmax(z)[each, targets] for z in (teachers, students, after))
    gained = ((log_t - log_s) * (log_after - log_s)).mean()
    assert gained > 0 and np.corrcoef(log_t - log_s, log_after - log_s)[0, 1] > 0.3


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "jsd"},
        pytest.param({"kind": "sampled_reverse_kl"}, marks=pytest.mark.slow),
        pytest.param({"kind": "forward_kl"}, marks=pytest.mark.slow),
    ],
)
def test_the_student_comes_near_the_teacher(world, kind):
    """On its own samples to held-out prompts."""
    phase = make(world, kind, rollout={"num_prompts": 16})
    state = phase.init(jax.random.PRNGKey(0))
    before = phase.evaluate(state).metrics
    state, _ = run(phase, 80, state, phase.records())
    after = phase.evaluate(state).metrics
    assert before["eval/sampled/reverse_kl"] > 0.5
    assert after["eval/sampled/reverse_kl"] < before["eval/sampled/reverse_kl"] / 2
    assert after["eval/sampled/forward_kl"] < before["eval/sampled/forward_kl"] / 2


def test_rewards_are_measured_and_nothing_is_trained_on_them(world):
    rewards = {"functions": {"threes": {"function": f"{world}/mine.py:threes"}}, "num_workers": 1}
    phase, plain = make(world, rewards=rewards), make(world)
    metrics = []
    for one in (phase, plain):
        state = one.init(jax.random.PRNGKey(0))
        state, collected = one.collect(state, one.records())
        (batch,) = collected.batches
        metrics.append((collected, one.evaluate(state), batch))
    (scored, held_out, batch), (bare, plain_held_out, other) = metrics
    jax.tree.map(np.testing.assert_array_equal, batch, other)
    assert {"reward", "rewards/threes/mean"} <= scored.metrics.keys()
    assert {"eval/sampled/reward", "eval/sampled/threes"} <= held_out.metrics.keys()
    for name in (*bare.metrics, *plain_held_out.metrics):
        assert "reward" not in name
    assert bare.samples[0]["reward"] is None and scored.samples[0]["reward"] is not None
    assert bare.warnings == []


@pytest.fixture(scope="module")
def three_steps(world):
    return run(make(world), 3)


WAYS = {
    "not packed": {"data": {"packed": False}},
    "4 micro-batches": {"data": {"micro_batches": 4}},
    "8 devices": {"sizes": (8, 1, 1)},
}


@pytest.mark.parametrize("way", WAYS)
def test_layout_split_and_devices_change_nothing(world, three_steps, way):
    assert_same(run(make(world, **WAYS[way]), 3), three_steps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [{"kind": "sampled_reverse_kl"}, pytest.param({"kind": "jsd"}, marks=pytest.mark.slow)],
)
def test_nothing_is_compiled_after_the_first_step(world, kind):
    algorithm = {"num_updates": 2, "num_minibatches": 2}
    phase = make(world, kind, data={"micro_batches": 2}, algorithm=algorithm)
    first, *others = compiled_by_step(phase, 4)
    assert first and others == [[]] * 3


@pytest.mark.slow
def test_several_updates_of_several_minibatches(world):
    algorithm = {"num_updates": 2, "num_minibatches": 2}
    phase = make(world, {"kind": "sampled_reverse_kl"}, algorithm=algorithm)
    _, seen = run(phase, 2)
    assert len(seen) == 8
    assert all(np.isfinite(value) for metrics in seen for value in metrics.values())
    assert seen[0]["sampling/sampling_logp_difference/max"] < 1e-5
    assert seen[2]["sampling/sampling_logp_difference/max"] > 1e-3, "the policy has moved"


@pytest.mark.parametrize(
    "kind", [{}, pytest.param({"kind": "sampled_reverse_kl"}, marks=pytest.mark.slow)]
)
def test_resuming_is_never_having_stopped(world, tmp_path, kind):
    expected, seen = run(make(world, kind), 4)
    phase = make(world, kind)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, _ = run(phase, 2, state, records)
    checkpoints = Checkpointer(tmp_path / "checkpoints", keep=1)
    checkpoints.save(2, state, {"records": records.get_state()})
    checkpoints.wait()
    again = make(world, kind)
    template, records = again.init(jax.random.PRNGKey(0)), again.records()
    _, state, position = checkpoints.restore(template, warn=pytest.fail)
    records.set_state(position["records"])
    state, rest = run(again, 2, state, records)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert rest == seen[2:]


def test_what_was_cut_is_trained_on_and_said(world):
    phase = make(world, rollout={"max_tokens": 1})
    kept = rl.Kept(phase)
    state = phase.init(jax.random.PRNGKey(0))
    _, collected = phase.collect(state, phase.records())
    (batch,) = collected.batches
    (found,) = kept.found
    assert (found.completions.finish_reasons == LENGTH).sum() >= 6
    assert np.asarray(batch["mask"]).sum() == 8
    (said,) = phase.diagnose({"completions/clipped_ratio": 1.0})
    assert "max_tokens=1" in said


def test_a_student_that_samples_what_the_teacher_cannot_read(world, tmp_path):
    model = Model(ModelConfig(vocab_size=NUM_TOKENS, **STUDENT))
    save(tmp_path / "teacher", model, model.init(jax.random.key(0)))
    for file in (world / "tokenizer").iterdir():
        (tmp_path / "teacher" / file.name).write_bytes(file.read_bytes())
    teacher = {"path": str(tmp_path / "teacher")}
    wider = {"init": {**STUDENT, "vocab_size": NUM_TOKENS + 1}}
    with pytest.raises(UserError, match="23 rows of embeddings and the student 24"):
        make(world, teacher=teacher, model=wider)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": {"kind": "sampled_reverse_kl", "temperature": 0.5}}, r"rollout\.temperature"),
        ({"kind": {"kind": "nearest"}}, "sampled_reverse_kl"),
        ({"data": {"micro_batches": 3}}, "do not divide"),
        ({"rollout": {"group_size": 0}}, "group_size=0"),
        ({"rollout": {"max_tokens": 60}}, "context of 64 tokens"),
    ],
)
def test_what_is_refused(world, changes, complaint):
    with pytest.raises((UserError, ValueError), match=complaint):
        make(world, **changes)
