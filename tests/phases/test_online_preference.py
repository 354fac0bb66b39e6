"""Online DPO: which samples are compared, that it learns, and what must not change it."""

import math

import jax
import numpy as np
import pytest

from alignjax.core.types import Completions, Sample, Score
from alignjax.phases.online_preference import OnlinePreference, best_and_worst, singles
from alignjax.phases.online_preference_config import OnlineConfig
from alignjax.phases.preference_loss import completion_logps
from alignjax.recipes import chains
from alignjax.rewards.rollout import Rollouts, Task
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.checkpoint import Checkpointer
from tests import alone
from tests.phases import rl
from tests.phases.compiled import compilations
from tests.phases.preferences import MODEL, assert_same, run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts, and a reward that likes threes."""
    folder = tmp_path_factory.mktemp("world")
    chains.write(folder, seed=0, num_questions=60, num_drills=20, num_train=40, num_test=16)
    (folder / "mine.py").write_text(
        "def threes(completion, **fields):\n    return completion.count('3') / 8\n"
        "def same(completion, **fields):\n    return 1.0\n"
        "def faulty(completion, **fields):\n    return 1.0 if '1' in completion else float('nan')\n"
    )
    return folder


def make(
    world, losses=None, data=None, sizes=(1, 1, 1), rollout=None, function="threes", **changes
):
    config = OnlineConfig.model_validate({
        "phase": "online_preference", "name": "x", "output_dir": str(world / "runs"),
        "model": {"init": MODEL}, "tokenizer": str(world / "tokenizer"),
        "losses": losses or {"dpo": {"beta": 0.1}},
        "data": {
            "train": str(world / "train.jsonl"), "eval": str(world / "test.jsonl"),
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}}, **(data or {}),
        },
        "rollout": {
            "num_prompts": 8, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8,
            **(rollout or {}),
        },
        "rewards": {
            "functions": {"mine": {"function": f"{world}/mine.py:{function}"}}, "num_workers": 1,
            "max_failure_frac": 1.0,
        },
        "evaluation": {"num_problems": 16, "num_samples": 4, "greedy": False},
        "optimizer": {"learning_rate": 1e-2},
        "loop": {"steps": 20},
        **changes,
    })  # fmt: skip
    mesh = make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
        jax.devices()[: math.prod(sizes)],
    )
    return OnlinePreference(config, mesh)


def rollouts_of(rewards):
    """Completion g of prompt n has length g + 1 and holds 10 n + g."""
    num, size = np.shape(rewards)
    lengths = np.tile(np.arange(1, size + 1), num)
    tokens = np.zeros((num * size, size), np.int32)
    for i, length in enumerate(lengths):
        tokens[i, :length] = 10 * (i // size) + i % size
    out = Completions(
        tokens, lengths, np.zeros(tokens.shape, np.float32), np.zeros(num * size, int)
    )
    tasks = [Task(np.array([n, n]), None, {}) for n in range(num)]
    samples = [Sample(prompt="", completion="", reference=None) for _ in lengths]
    scores = [Score(None if np.isnan(r) else float(r)) for r in np.ravel(rewards)]
    return Rollouts(tasks, out, samples, scores)


def test_the_best_and_the_worst_of_each_prompt():
    nan = np.nan
    elements, metrics = best_and_worst(rollouts_of([
        [0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [nan, 5.0, 4.0], [nan, 7.0, nan], [3.0, 3.0, 0.5],
        [nan, nan, nan],
    ]))  # fmt: skip
    found = [(e.prompt.tolist(), *(c.tolist() for c in e.completions), e.margin) for e in elements]
    assert found == [
        ([0, 0], [1, 1], [2, 2, 2], 3.0), ([2, 2], [21, 21], [22, 22, 22], 1.0),
        ([4, 4], [40], [42, 42, 42], 2.5),
    ]  # fmt: skip
    assert metrics == {"reward_margin": pytest.approx(6.5 / 3), "frac_reward_zero_std": 0.5}
    labels = [(e.prompt[0], e.completions[0][0], e.label) for e in singles(elements)]
    assert labels == [
        (0, 1, True), (2, 21, True), (4, 40, True), (0, 2, False), (2, 22, False), (4, 42, False),
    ]  # fmt: skip


def test_it_learns_to_be_rewarded_at_a_kl_that_is_measured(world):
    phase = make(world, {"dpo": {"beta": 0.1}}, rollout={"temperature": 0.8})
    state = phase.init(jax.random.PRNGKey(0))
    first = jax.device_get(state.params)
    before = phase.evaluate(state).metrics
    state, seen = run(phase, 25, state, phase.records())
    kept = rl.Kept(phase).found
    with compilations() as names:
        after = phase.evaluate(state).metrics
    assert names == []
    assert after["eval/sampled/reward"] > before["eval/sampled/reward"] + 0.25
    assert seen[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert before["eval/sampled/kl"] == pytest.approx(0, abs=1e-4)
    # By all logits of each sample by itself.
    (found,) = kept
    prompts, lengths = [found.tasks[i // 4].tokens for i in range(64)], found.completions.lengths
    texts = [
        np.concatenate([prompt, ids[:num]])
        for prompt, ids, num in zip(prompts, found.completions.tokens, lengths, strict=True)
    ]
    rows = alone.rows(*texts, width=24)
    after_it, before_it = (
        np.asarray(alone.next_logps(phase._policy.model, params, 0.8, *rows))
        for params in (state.params, first)
    )
    ratios = [
        (after_it - before_it)[i, len(prompt) - 1 : len(prompt) + num - 1].sum()
        for i, (prompt, num) in enumerate(zip(prompts, lengths, strict=True))
    ]
    assert after["eval/sampled/kl"] == pytest.approx(np.mean(ratios), rel=1e-3)
    assert after["eval/sampled/kl"] > 1


def test_rows_hold_what_was_sampled(world):
    """Log-probs that were recorded while sampling are those of the rows, stop token included."""
    phase = make(world)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    kept = rl.Kept(phase).found
    state, collected = phase.collect(state, records)
    (batch,) = collected.batches
    micro = {name: x[0] for name, x in batch.items()}
    sums = completion_logps(phase._learner._scorer, state.params, micro)[0]
    found = np.asarray(sums.sums)[np.asarray(sums.is_valid)]
    ((out, rewards),) = [(rollouts.completions, rollouts.rewards) for rollouts in kept]
    expected = [
        out.logps[4 * n + g, : out.lengths[4 * n + g]].sum()
        for n, group in enumerate(rewards)
        if group.max() > group.min()
        for g in (group.argmax(), group.argmin())
    ]
    assert len(expected) >= 8
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-5)


@pytest.fixture(scope="module")
def three_steps(world):
    return run(make(world), 3)


WAYS = {
    "plain prompts": {"data": {"shared_prompt": False}},
    "not packed": {"data": {"packed": False}},
    "4 micro-batches": {"data": {"micro_batches": 4}},
    "8 devices": {"sizes": (8, 1, 1)},
}


@pytest.mark.parametrize("way", WAYS)
def test_layout_split_and_devices_change_nothing(world, three_steps, way):
    assert_same(run(make(world, **WAYS[way]), 3), three_steps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("losses", [{"kto": {}}, {"bco": {}}, {"simpo": {}}])
def test_other_losses_and_several_updates(world, losses):
    phase = make(world, losses, algorithm={"num_updates": 2, "num_minibatches": 2})
    _, seen = run(phase, 2)
    assert len(seen) == 8
    assert all(math.isfinite(value) for metrics in seen for value in metrics.values())
    assert all(metrics["num_skipped_updates"] == 0 for metrics in seen)


def test_nothing_to_compare(world):
    phase = make(world, function="same")
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, collected = phase.collect(state, records)
    assert list(collected.batches) == []
    assert collected.metrics["frac_reward_zero_std"] == 1
    (said,) = phase.diagnose(collected.metrics)
    assert "no prompt" in said


def test_failed_rewards_are_counted(world):
    phase = make(world, function="faulty")
    _, collected = phase.collect(phase.init(jax.random.PRNGKey(0)), phase.records())
    assert collected.metrics["num_failed_rewards"] > 0
    assert "have no reward" in collected.warnings[0]


def test_resuming_is_never_having_stopped(world, tmp_path):
    expected, seen = run(make(world), 4)
    phase = make(world)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, _ = run(phase, 2, state, records)
    checkpoints = Checkpointer(tmp_path / "checkpoints", keep=1)
    checkpoints.save(2, state, {"records": records.get_state()})
    checkpoints.wait()
    again = make(world)
    template, records = again.init(jax.random.PRNGKey(0)), again.records()
    _, state, position = checkpoints.restore(template, warn=pytest.fail)
    records.set_state(position["records"])
    state, rest = run(again, 2, state, records)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert rest == seen[2:]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"losses": {"soft_dpo": {}}}, "a reward gives none"),
        ({"data": {"micro_batches": 3}}, "do not divide into 1 minibatches of 3"),
        ({"losses": {"aot": {}}, "data": {"micro_batches": 2}}, "sorts the pairs"),
        ({"rollout": {"group_size": 1}}, "group_size=1"),
    ],
)
def test_what_is_refused(world, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(world, **changes)
