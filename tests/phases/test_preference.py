"""The preference phase: against torch, that it learns, and what must not change it."""

import functools
import json

import jax
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.phases import preference_step
from alignjax.phases.preference_loss import pair_loss
from alignjax.train.checkpoint import Checkpointer
from tests.phases.preferences import assert_same, make, run, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- against a loop of our own in torch -----------------------------------------------------------


def torch_logps(model, tokenizer, prompt, completion):
    """Log-prob of a completion and EOS after a prompt: a sum, by hand."""
    import torch

    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids = torch.tensor([[*before, *tokenizer.encode(completion), tokenizer.eos_id]])
    logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
    places = torch.arange(len(before), ids.shape[1])
    return logps[places - 1, ids[0, places]].sum()


def test_20_steps_and_a_gradient_are_those_of_torch(world, tmp_path):
    """DPO written down once more, one text at a time, on the weights that the phase begins with."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    optimizer = {"learning_rate": 2e-3, "weight_decay": 0.0, "b2": 0.99, "eps": 1e-6}
    phase = make(world, {"dpo": {"beta": 0.3}}, optimizer=optimizer)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    phase.export(state, tmp_path / "start")
    theirs, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
        for _ in range(2)
    )
    tokenizer, texts = phase._policy.tokenizer, records_of(world / "pairs.jsonl")
    adam = torch.optim.AdamW(
        theirs.parameters(), lr=2e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0
    )
    ours, expected = [], []
    gradient = jax.jit(
        jax.grad(lambda p, mb: pair_loss(phase._learner._scorer, phase._learner.objective, p, mb)[0]
                 .total)
    )  # fmt: skip
    for step in range(20):
        position = records.get_state()
        places = next(records)["index"]
        records.set_state(position)
        state, collected = phase.collect(state, records)
        (batch,) = collected.batches
        if step == 0:
            first = jax.device_get(gradient(state.params, {k: v[0] for k, v in batch.items()}))
        state, metrics = phase.step(state, batch)
        ours.append((float(metrics["loss"]), float(metrics["grad_norm"])))

        losses = []
        for place in places[places >= 0]:
            record = texts[place]
            gains = []
            for which in ("chosen", "rejected"):
                text = tokenizer, record["prompt"], record[which]
                with torch.no_grad():
                    ref = torch_logps(reference, *text)
                gains.append(torch_logps(theirs, *text) - ref)
            losses.append(-torch.nn.functional.logsigmoid(0.3 * (gains[0] - gains[1])))
        assert len(losses) == 8
        loss = torch.stack(losses).mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        if step == 0:
            clip = min(1.0, 1.0 / float(norm))
            own = {n: p.grad.numpy() / clip for n, p in theirs.named_parameters()}
        adam.step()
        expected.append((float(loss.detach()), float(norm)))
    assert expected[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert expected[-1][0] < 0.5
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in expected], atol=1e-4)
    # The gradient of the sum over 8 pairs, under the names of the published format.
    phase._policy.export(jax.tree.map(lambda x: x / 8, first), tmp_path / "gradient")
    found = safetensors.load_file(tmp_path / "gradient" / "model.safetensors")
    assert found.keys() <= own.keys() and len(found) > 10
    for name, value in found.items():
        np.testing.assert_allclose(value, own[name], atol=2e-6, err_msg=name)


# --- it learns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "accuracy"), [({"dpo": {"beta": 0.5}}, 0.95), ({"kto": {"beta": 0.5}}, 0.65)]
)
def test_it_learns_a_rule(world, losses, accuracy):
    """Of kto what counts is on which side of the KL a response is."""
    phase = make(
        world, losses, {"train": str(world / "more.jsonl"), "num_prompts": 16},
        optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    state, seen = run(phase, 40)
    found = phase.evaluate(state).metrics
    assert found["eval/rewards/accuracies"] > accuracy
    low, high = (found[f"eval/rewards/accuracies_{end}"] for end in ("low", "high"))
    assert accuracy - 0.15 < low <= found["eval/rewards/accuracies"] <= high <= 1
    assert found["eval/loss"] < 0.7 * seen[0]["loss"]
    assert found["eval/rewards/chosen"] > found["eval/rewards/rejected"] + 1


# --- what must not change it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def five_steps(world):
    """Shared prompts, packed, one micro-batch, one device."""
    return run(make(world), 5)


WAYS = {
    "plain prompts": {"data": {"shared_prompt": False}},
    "not packed": {"data": {"packed": False}},
    "4 micro-batches": {"data": {"micro_batches": 4}},
    "8 devices": {"sizes": (8, 1, 1)},
    "8 devices in a grid": {"sizes": (2, 2, 2)},
}


@pytest.mark.parametrize("way", WAYS)
def test_layout_split_and_devices_change_nothing(world, five_steps, way):
    assert_same(run(make(world, **WAYS[way]), 5), five_steps)
    assert five_steps[1][-1]["rewards/margins"] > 0.01


def test_the_kl_of_kto_is_of_the_whole_batch(world):
    """However it is split; a mean over each micro-batch would be another."""
    losses = {"kto": {}}
    whole = run(make(world, losses), 4)
    assert_same(run(make(world, losses, {"micro_batches": 4}), 4), whole)
    assert any(abs(seen["kl"]) > 1e-3 for seen in whole[1])


def test_delta_of_bco_is_the_mean_of_the_rewards_before(world):
    """By hand from the rewards of each step; the same however it is split."""
    losses, quick = {"bco": {"beta": 0.1}}, {"optimizer": {"learning_rate": 1e-2}}
    whole = run(make(world, losses, **quick), 4)
    means = [(s["rewards/chosen"] + s["rewards/rejected"]) / 2 for s in whole[1]]
    expected = [0.0, *(np.mean(means[:n]) for n in (1, 2, 3))]
    np.testing.assert_allclose([s["delta"] for s in whole[1]], expected, atol=1e-6)
    assert abs(expected[-1]) > 1e-4
    assert_same(run(make(world, losses, {"micro_batches": 2}, **quick), 4), whole)


@pytest.mark.parametrize("losses", [{"bco": {"beta": 0.1}}, {"kto": {}}])
def test_resuming_is_never_having_stopped(world, tmp_path, losses):
    """Bit for bit, from a checkpoint on disk, in a phase made anew."""
    expected, seen = run(make(world, losses), 6)
    phase = make(world, losses)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, _ = run(phase, 3, state, records)
    checkpoints = Checkpointer(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, state, {"records": records.get_state()})
    checkpoints.wait()
    again = make(world, losses)
    template, records = again.init(jax.random.PRNGKey(0)), again.records()
    _, state, position = checkpoints.restore(template, warn=pytest.fail)
    records.set_state(position["records"])
    state, rest = run(again, 3, state, records)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert rest == seen[3:]


# --- the reference --------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Counts the batches that a reference is asked for."""
    calls = []
    original = preference_step.reference_logps

    def jit(function, **options):
        compiled = jax_jit(function, **options)

        def counted(*args):
            calls.append(args)
            return compiled(*args)

        return counted if function is original else compiled

    monkeypatch.setattr(preference_step.jax, "jit", jit)
    return calls


jax_jit = jax.jit


def test_the_reference_is_asked_once(world, tmp_path, computed):
    """For all epochs of a run, and for all runs with the same weights and data."""
    options = {"cache_dir": str(tmp_path / "cache")}
    run(make(world, **options), 7)  # 40 pairs, 8 in an update: more than an epoch
    assert len(computed) == 5 + 4  # and 32 held out
    run(make(world, {"ipo": {}}, **options), 1)
    assert len(computed) == 9
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for changes in ({"data": {"shared_prompt": False}}, {"length_alpha": 0.5}):
        before = len(computed)
        run(make(world, **changes, **options), 1)
        assert len(computed) == before + 9
    other = make(world, **options)
    before = len(computed)
    other.init(jax.random.PRNGKey(1))  # other weights
    assert len(computed) == before + 9


def test_no_reference_is_asked_where_none_is_read(world, computed):
    run(make(world, {"simpo": {}}), 1)
    assert not computed


def test_the_reference_may_be_another_model(world, tmp_path):
    """With its log-probs instead of its own, the first loss is not log 2."""
    start = make(world)
    start.export(start.init(jax.random.PRNGKey(5)), tmp_path / "other")
    own, other = make(world), make(world, reference=str(tmp_path / "other"))
    (first,), (second,) = run(own, 1)[1], run(other, 1)[1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(second["loss"] - np.log(2)) > 1e-3
    # Rewards are beta times policy less reference: of the other model's log-probs, by itself.
    judged = make(world, model={"path": str(tmp_path / "other")}, tokenizer=None)
    (third,) = run(judged, 1)[1]
    expected = 0.1 * (second["logps/chosen"] - third["logps/chosen"])
    assert second["rewards/chosen"] == pytest.approx(expected, abs=1e-5)


def test_under_lora_the_reference_is_the_base(world, tmp_path):
    start = make(world)
    start.export(start.init(jax.random.PRNGKey(5)), tmp_path / "base")
    phase = make(
        world, model={"path": str(tmp_path / "base"), "lora": {"rank": 4, "alpha": 8}},
        tokenizer=None, optimizer={"learning_rate": 1e-2},
    )  # fmt: skip
    state, seen = run(phase, 8)
    assert phase._learner.reference(state.params)[1] is phase._policy.frozen
    assert seen[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert seen[-1]["loss"] < 0.68
    assert all("lora" in jax.tree_util.keystr(path) for path, _ in
               jax.tree_util.tree_leaves_with_path(state.params))  # fmt: skip


# --- what the data must be ------------------------------------------------------------------------


def test_overlong_pairs_are_left_out_and_counted(world):
    phase = make(world, data={"row_len": 18})
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    for _ in range(4):
        state, collected = phase.collect(state, records)
    assert 0 < collected.metrics["num_dropped"] < 40
    with pytest.raises(UserError, match=r"pairs\.jsonl:\d+"):
        strict = make(world, data={"row_len": 18, "overlong": "error"})
        strict.init(jax.random.PRNGKey(0))


def test_probabilities_of_soft_labels(world, tmp_path):
    data = {"prob_field": "sure", "eval": None}
    _, seen = run(make(world, {"soft_dpo": {}}, data), 1)
    assert seen[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    lines = records_of(world / "pairs.jsonl")
    lines[3]["sure"] = 1.5
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data["train"] = str(tmp_path / "wrong.jsonl")
    with pytest.raises(UserError, match=r"wrong\.jsonl:4: sure: expected a probability.*came 1.5"):
        run(make(world, {"soft_dpo": {}}, data), 5)


def test_ties_hold_both_responses_where_they_are(world, tmp_path):
    """Of a tie, -(log sigmoid(beta d) + log sigmoid(-beta d)) / 2 has no slope at d = 0."""
    tied = {"prompt": "1+1=", "responses": ["2", "3"], "ranks": [1, 1], "sure": 0.5}
    ranked = {"prompt": "2+2=", "responses": ["5", "4"], "ranks": [2, 1], "sure": 0.9}
    found = {}
    for name, records in (("tied", [tied]), ("both", [tied, ranked])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        data = {"train": str(path), "eval": None, "prob_field": "sure", "ties": True,
                "num_prompts": len(records)}  # fmt: skip
        _, (found[name],) = run(make(world, {"soft_dpo": {}}, data), 1)
        assert found[name]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert found["tied"]["grad_norm"] < 1e-6 < 1e-3 < found["both"]["grad_norm"]
    # Which one is better is not said of a tie: it has no part in these metrics.
    assert found["tied"]["rewards/accuracies"] == 0 and found["tied"]["logps/chosen"] == 0
    assert found["both"]["rewards/accuracies"] == 0.5 and found["both"]["logps/chosen"] < 0


def test_an_empty_response_is_refused(world, tmp_path):
    record = {"prompt": "1+1", "chosen": "2", "rejected": ""}
    (tmp_path / "empty.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"empty\.jsonl:1"):
        make(world, data={"train": str(tmp_path / "empty.jsonl")})


def test_the_same_gradient_with_shared_and_plain_prompts(world):
    """Loss and each gradient, of one batch in both layouts."""
    found = []
    for shared_prompt in (True, False):
        phase = make(world, data={"shared_prompt": shared_prompt})
        state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
        state, collected = phase.collect(state, records)
        (batch,) = collected.batches
        moved = jax.tree.map(lambda x: x + 0.01, state.params)
        loss = functools.partial(pair_loss, phase._learner._scorer, phase._learner.objective)
        total = lambda p, mb, loss=loss: loss(p, mb)[0].total  # noqa: E731
        micro = {name: x[0] for name, x in batch.items()}
        found.append((collected.num_tokens, jax.jit(jax.value_and_grad(total))(moved, micro)))
    (few, shared), (many, plain) = found
    assert few < many - 20
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), shared, plain)
