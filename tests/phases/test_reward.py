"""Reward models: a step by hand in float64, what must not change it, that it learns, its files."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.data import (
    Preference,
    comparison_encoder,
    open_preferences,
    rankings,
    write_preferences,
)
from alignjax.models import Model, ModelConfig, load_reward, save
from alignjax.models.heads import last_values
from alignjax.phases.reward import Reward, completion_lengths
from alignjax.phases.reward_config import RewardPhaseConfig
from alignjax.phases.reward_model import score_elements
from alignjax.recipes import sevens
from alignjax.recipes.stage import export_checkpoint, run_phase
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.train.loop import LoopConfig

SHAPE = {
    "family": "qwen3", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "intermediate_size": 32, "rope_theta": 100.0, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sevens.write(folder, seed=1)
    ranked = list(open_preferences(str(folder / "train.jsonl")))
    write_preferences(folder / "few.jsonl", ranked[:21])
    two = [one for one in ranked if len(one.responses) == 2]
    write_preferences(folder / "pairs.jsonl", two[:40], "pairs")
    return folder


def make(world, data=None, sizes=(1, 1, 1), **changes):
    values = {
        "phase": "reward", "name": "x", "model": {"init": SHAPE},
        "tokenizer": str(world / "tokenizer"),
        "data": {
            "train": str(world / "few.jsonl"), "eval": str(world / "test.jsonl"),
            "row_len": 96, "num_prompts": 8, "shared_prompt": False, **(data or {}),
        },
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1}, "loop": {"steps": 100},
        **changes,
    }  # fmt: skip
    mesh = make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
        jax.devices()[: math.prod(sizes)],
    )
    return Reward(RewardPhaseConfig.model_validate(values), mesh)


def run(phase, num_steps):
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seen = []
    for _ in range(num_steps):
        state, collected = phase.collect(state, records)
        for batch in collected.batches:
            state, metrics = phase.step(state, batch)
            seen.append(jax.device_get(metrics))
    return state, seen


def alone(phase, params):
    """(prompt ids, completion ids) -> the score, from a row with nothing else in it."""
    model = phase._reward.model
    apply = jax.jit(model.apply)

    def score(params, prompt, completion):
        ids = np.zeros((1, 64), np.int32)
        length = len(prompt) + len(completion)
        ids[0, :length] = [*prompt, *completion]
        is_real = (np.arange(64) < length)[None].astype(np.int32)
        values = apply(params, ids, is_real, np.arange(64, dtype=np.int32)[None])
        return values[0, length - 1]

    return score


def log_sigmoid(x):
    return -np.logaddexp(0.0, -x)


OBJECTIVES = {
    "kwise": lambda s, r: (
        -np.mean(
            [log_sigmoid(s[i] - s[j]) for i in range(len(s)) for j in range(len(s)) if r[i] < r[j]]
        )
    ),
    "plackett_luce": lambda s, r: sum(
        np.log(sum(np.exp(s[j]) for j in range(len(s)) if j == i or r[j] > r[i])) - s[i]
        for i in range(len(s))
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_metrics_element_by_element(world, name):
    phase = make(world, objective={"name": name, "score_coef": 0.1})
    state = phase.init(jax.random.PRNGKey(3))
    state, collected = phase.collect(state, phase.records())
    (batch,) = collected.batches
    indices = np.asarray(batch["index"])
    view = rankings(open_preferences(str(world / "few.jsonl")))
    encode = comparison_encoder(phase._config.data.text, phase._reward.tokenizer)
    score = alone(phase, state.params)
    terms, right, margins, everything = [], [], [], []
    for index in indices[indices >= 0]:
        element = encode(view[int(index)])
        scores = np.array(
            [float(score(state.params, element.prompt, c)) for c in element.completions]
        )
        ranks = element.ranks
        terms.append(OBJECTIVES[name](scores, ranks) + 0.1 * np.mean(scores**2))
        gaps = [
            scores[i] - scores[j]
            for i in range(len(ranks)) for j in range(len(ranks)) if ranks[i] < ranks[j]
        ]  # fmt: skip
        right.append(np.mean([gap > 0 for gap in gaps]))
        margins.append(np.mean(gaps))
        everything += scores.tolist()
    assert len(terms) == 8 and np.std(everything) > 0.1
    _, metrics = phase.step(state, batch)
    assert metrics["loss"] == pytest.approx(np.mean(terms), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    assert metrics["margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert metrics["min_reward"] == pytest.approx(min(everything), abs=1e-5)
    assert metrics["mean_reward"] == pytest.approx(np.mean(everything), abs=1e-5)
    assert metrics["max_reward"] == pytest.approx(max(everything), abs=1e-5)


def test_the_gradient_of_a_step_against_one_written_out(world):
    """Of the mean over elements, each response scored alone: Adam's first mean of it is a tenth."""
    optimizer = {"learning_rate": 1e-2, "max_grad_norm": 1e9, "b1": 0.9}
    phase = make(world, {"num_prompts": 4, "shared_prompt": True}, optimizer=optimizer)
    state = phase.init(jax.random.PRNGKey(3))
    state, collected = phase.collect(state, phase.records())
    (batch,) = collected.batches
    indices = np.asarray(batch["index"])
    view = rankings(open_preferences(str(world / "few.jsonl")))
    encode = comparison_encoder(phase._config.data.text, phase._reward.tokenizer)
    score = alone(phase, state.params)
    elements = [encode(view[int(i)]) for i in indices[indices >= 0]]

    def loss(params):
        total = 0.0
        for element in elements:
            s = [score(params, element.prompt, c) for c in element.completions]
            pairs = [
                jnp.log1p(jnp.exp(s[j] - s[i]))
                for i in range(len(s)) for j in range(len(s))
                if element.ranks[i] < element.ranks[j]
            ]  # fmt: skip
            total += sum(pairs) / len(pairs)
        return total / len(elements)

    expected = jax.device_get(jax.grad(loss)(state.params))
    state, metrics = phase.step(state, batch)
    ((_, found),) = optax.tree.get_all_with_path(state.opt_state, "mu")
    jax.tree.map(lambda m, g: np.testing.assert_allclose(10 * m, g, atol=2e-5), found, expected)
    norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(expected)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.1


def test_it_learns(world):
    phase = make(
        world, {"train": str(world / "train.jsonl"), "num_prompts": 32, "shared_prompt": True},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 5}, loop={"steps": 120},
        model={"init": SHAPE | {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2}},
    )  # fmt: skip
    before = phase.evaluate(phase.init(jax.random.PRNGKey(0))).metrics
    state, _ = run(phase, 120)
    after = phase.evaluate(state).metrics
    assert before["eval/accuracy"] < 0.65 and before["eval/num_dropped"] == 0
    assert after["eval/accuracy"] > 0.9 and after["eval/loss"] < 0.3
    assert after["eval/accuracy_low"] < after["eval/accuracy"] <= after["eval/accuracy_high"]
    assert after["eval/margin"] > 2 and after["eval/ece"] < 0.1
    assert after["eval/accuracy_by_length/shorter"] > 0.8
    assert after["eval/accuracy_by_length/longer"] > 0.8


@pytest.fixture(scope="module")
def five_steps(world):
    """One device, one micro-batch, packed, each completion after a prompt of its own."""
    state, seen = run(make(world), 5)
    return jax.device_get(state.params), seen


def assert_same(result, reference):
    state, seen = result
    params, expected = reference
    for got, want in zip(seen, expected, strict=True):
        for name in want:
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-4, abs=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_8_devices_change_nothing(world, five_steps, sizes):
    assert_same(run(make(world, sizes=sizes), 5), five_steps)


def test_4_micro_batches_change_nothing(world, five_steps):
    assert_same(run(make(world, {"micro_batches": 4}), 5), five_steps)


def test_packing_changes_nothing(world, five_steps):
    assert_same(run(make(world, {"packed": False}), 5), five_steps)


@pytest.mark.parametrize("packed", [True, False])
def test_sharing_prompts_changes_nothing(world, five_steps, packed):
    assert_same(run(make(world, {"shared_prompt": True, "packed": packed}), 5), five_steps)


def test_position_of_the_records_is_all_that_is_needed_to_go_on(world):
    phase = make(world)
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    for _ in range(3):
        phase.collect(state, records)
    position = json.loads(json.dumps(records.get_state()))
    expected = [phase.collect(state, records)[1] for _ in range(3)]
    again = make(world).records()
    again.set_state(position)
    for want in expected:
        got = phase.collect(state, again)[1]
        assert (got.num_tokens, got.metrics) == (want.num_tokens, want.metrics)
        (a,), (b,) = got.batches, want.batches
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_bradley_terry_is_kwise_ranking_of_two(world):
    data = {"train": str(world / "pairs.jsonl"), "eval": None}
    expected = run(make(world, data), 3)[1]
    for objective in ({"name": "bradley_terry"}, {"name": "plackett_luce"}):
        for got, want in zip(run(make(world, data, objective=objective), 3)[1], expected,
                             strict=True):  # fmt: skip
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    centred = run(make(world, data, objective={"name": "bradley_terry", "center_coef": 0.1}), 1)[1]
    assert centred[0]["loss"] > expected[0]["loss"] + 1e-4


def test_margins_of_the_data(world, tmp_path):
    """-log sigmoid(d - m) of each pair, with the margins 0.5 (4 - 1) and 0.5 (2 - 1)."""
    scored = [
        Preference("1=", ["7", "9"], scores=[4.0, 1.0]),
        Preference("2=", ["6", "33"], scores=[1.0, 2.0]),
    ]
    write_preferences(tmp_path / "scored.jsonl", scored)
    data = {
        "train": str(tmp_path / "scored.jsonl"), "eval": None, "pairs": "all", "margin": "scores",
        "margin_scale": 0.5, "num_prompts": 2,
    }  # fmt: skip
    phase = make(world, data, objective={"name": "bradley_terry_margin"})
    state = phase.init(jax.random.PRNGKey(3))
    encode = comparison_encoder(phase._config.data.text, phase._reward.tokenizer)
    score, expected = alone(phase, state.params), []
    for index, margin in ((0, 1.5), (1, 0.5)):
        element = encode(phase._train[index])
        better, worse = (float(score(state.params, element.prompt, c)) for c in element.completions)
        expected.append(-log_sigmoid(better - worse - margin))
    _, collected = phase.collect(state, phase.records())
    _, metrics = phase.step(state, collected.batches[0])
    assert metrics["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_soft_labels_and_ties(world, tmp_path):
    """-p log sigmoid(d) - (1 - p) log sigmoid(-d) of each pair, of a tie with p = 1/2, which has no
    part in the accuracy."""
    records = [
        {"prompt": "1=", "responses": ["7", "9"], "ranks": [2, 1], "sure": 0.75},
        {"prompt": "2=", "responses": ["6", "33"], "ranks": [1, 1], "sure": 0.5},
    ]
    path = tmp_path / "soft.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {
        "train": str(path), "eval": None, "pairs": "all", "prob_field": "sure", "ties": True,
        "num_prompts": 2,
    }  # fmt: skip
    phase = make(world, data, objective={"name": "soft_bradley_terry"})
    state = phase.init(jax.random.PRNGKey(3))
    encode = comparison_encoder(phase._config.data.text, phase._reward.tokenizer)
    score, expected, gains = alone(phase, state.params), [], []
    for index, p in ((0, 0.75), (1, 0.5)):
        element = encode(phase._train[index])
        better, worse = (float(score(state.params, element.prompt, c)) for c in element.completions)
        gains.append(better - worse)
        expected.append(-p * log_sigmoid(gains[-1]) - (1 - p) * log_sigmoid(-gains[-1]))
    _, collected = phase.collect(state, phase.records())
    assert collected.metrics["num_left_out"] == 0
    _, metrics = phase.step(state, collected.batches[0])
    assert metrics["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert metrics["margin"] == pytest.approx(gains[0], rel=1e-5)
    assert metrics["accuracy"] == (gains[0] > 0)


def test_what_is_left_out_is_counted(world, tmp_path):
    records = [
        {"prompt": "1=", "responses": ["7", "9"], "ranks": [1, 2]},
        {"prompt": "2=", "responses": ["7", "9"], "ranks": [1, 1]},
        {"prompt": "3=", "responses": ["7", "7"], "ranks": [1, 2]},
        {"prompt": "4=", "responses": ["7" * 70, "9"], "ranks": [1, 2]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"train": str(path), "eval": None, "num_prompts": 2}
    with pytest.raises(UserError, match=r"mixed\.jsonl:3: responses\[0\] and responses\[1\] are"):
        make(world, data)
    phase = make(world, data | {"faulty": "drop"})
    records = phase.records()
    for _ in range(2):
        _, collected = phase.collect(phase.init(jax.random.PRNGKey(0)), records)
    assert collected.metrics["num_faulty"] == 1 and collected.metrics["num_left_out"] == 1
    assert collected.metrics["num_dropped"] >= 3
    phase = make(world, data | {"faulty": "drop", "eval": str(path)})
    found = phase.evaluate(phase.init(jax.random.PRNGKey(0))).metrics
    assert found["eval/num_dropped"] == 1 and found["eval/num_pairs"] == 1
    with pytest.raises(UserError, match=r"mixed\.jsonl:4: 74 tokens, but only 64 fit"):
        bad = make(world, data | {"faulty": "drop", "overlong": "error"})
        bad.collect(None, bad.records())


def test_lengths_of_completions(world):
    phase = make(world)
    batch = next(phase.records())
    lengths = completion_lengths(batch)
    assert ((lengths > 0) == (batch["ranks"] > 0)).all()
    assert lengths.sum() == batch["mask"].sum()
    encode = comparison_encoder(phase._config.data.text, phase._reward.tokenizer)
    for place in zip(*np.nonzero(batch["index"] >= 0), strict=True):
        element = encode(phase._train[int(batch["index"][place])])
        expected = [len(c) for c in element.completions]
        assert lengths[place][: len(expected)].tolist() == expected


def test_transformers_scores_the_same(world, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the dev extra")
    transformers = pytest.importorskip("transformers", reason="needs the dev extra")
    demonstrations = [{"prompt": "1=", "completion": c} for c in ("7", "12", "345")]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in demonstrations))
    phase = make(world, {"reference": str(path)})
    state, _ = run(phase, 3)
    phase.export(state, tmp_path / "model")
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = phase._reward.tokenizer
    texts = [
        [tokenizer.bos_id, *tokenizer.encode(d["prompt"] + d["completion"]), tokenizer.eos_id]
        for d in demonstrations
    ]
    width = max(map(len, texts))
    ids = torch.tensor([t + [phase._reward.pad_id] * (width - len(t)) for t in texts])
    is_real = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in texts])
    with torch.no_grad():
        expected = read.eval()(input_ids=ids, attention_mask=is_real).logits[:, 0].numpy()
    assert expected.std() > 0.05
    model, params = load_reward(tmp_path / "model")
    values = model.apply(
        params, ids.numpy().astype(np.int32), is_real.numpy().astype(np.int32),
        np.arange(width, dtype=np.int32)[None].repeat(3, 0),
    )  # fmt: skip
    scores, _ = last_values(values, jnp.asarray(is_real.numpy(), jnp.int32), 1)
    np.testing.assert_allclose(scores[:, 0], expected, atol=1e-4)
    stated = json.loads((tmp_path / "model" / "reward.json").read_text())
    assert stated["num"] == 3
    assert stated["mean"] == pytest.approx(expected.astype(np.float64).mean(), abs=1e-4)
    assert stated["std"] == pytest.approx(expected.astype(np.float64).std(), abs=1e-4)


def test_the_reference_is_the_held_out_or_else_the_training_data(world, tmp_path):
    for held_out, expected in ((str(world / "test.jsonl"), "test"), (None, "few")):
        phase = make(world, {"eval": held_out})
        phase.export(phase.init(jax.random.PRNGKey(0)), tmp_path / expected)
        stated = json.loads((tmp_path / expected / "reward.json").read_text())
        read = open_preferences(str(world / f"{expected}.jsonl"))
        assert stated["num"] == sum(len(one.responses) for one in read)


def test_lora_trains_adapters_and_the_head_on_an_untied_policy(world, tmp_path):
    config = ModelConfig(vocab_size=15, tie_embeddings=False, **SHAPE)
    policy = Model(config)
    save(tmp_path / "policy", policy, policy.init(jax.random.key(1)))
    whole = make(world, model={"path": str(tmp_path / "policy")})
    state = whole.init(jax.random.PRNGKey(0))
    assert "unembedding" not in state.params["decoder"]
    source = {"path": str(tmp_path / "policy"), "lora": {"rank": 4}}
    phase = make(world, model=source)
    state, _ = run(phase, 8)
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert all("lora" in name or "head" in name for name in names) and len(names) > 2
    fresh = phase.evaluate(phase.init(jax.random.PRNGKey(0))).metrics["eval/loss"]
    plain = whole.evaluate(whole.init(jax.random.PRNGKey(0))).metrics["eval/loss"]
    assert fresh == pytest.approx(plain, rel=1e-5), "new adapters change nothing"
    trained = phase.evaluate(state).metrics["eval/loss"]
    assert abs(trained - fresh) > 1e-3
    phase.export(state, tmp_path / "model")
    model, params = load_reward(tmp_path / "model")
    assert model.decoder.lora is None
    batch = next(phase.records())
    expected = np.asarray(phase._scores(phase._reward.whole(state.params), batch))
    first = {name: value[0] for name, value in batch.items()}
    got = score_elements(model, params, first, shared_prompt=False)
    np.testing.assert_allclose(got, expected[0], atol=1e-5)
    with pytest.raises(UserError, match="export the model, without --adapter"):
        phase._reward.export_adapter(state.params, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "kwise", "center_coef": 0.1}}, "'kwise' has no center_coef; it"),
        ({"objective": {"name": "bradley_terry_margin"}}, "a margin go together"),
        ({"data": {"margin": "scores"}}, "a margin go together"),
        (
            {"objective": {"name": "bradley_terry_margin"}, "data": {"margin": "scores"}},
            "margins are of pairs: set data.pairs",
        ),
        ({"objective": {"name": "soft_bradley_terry"}}, "the probabilities go together"),
        ({"data": {"prob_field": "sure"}}, "the probabilities go together"),
        (
            {"objective": {"name": "soft_bradley_terry"}, "data": {"prob_field": "sure"}},
            "probabilities are of pairs: set data.pairs",
        ),
        ({"data": {"ties": True, "pairs": "all"}}, "data.ties needs soft_bradley_terry"),
        ({"data": {"micro_batches": 3}}, "num_prompts=8 comparisons do not divide into 3"),
        (
            {"model": {"path": "x", "lora": {"rank": 2, "dropout": 0.1}}},
            "both responses of a pair are to be scored by the same model",
        ),
    ],
)
def test_a_bad_config_is_refused(world, changes, message):
    with pytest.raises(ValidationError, match=message):
        make(world, **changes)


def test_pairwise_objectives_want_pairs(world):
    objective = {"name": "bradley_terry"}
    with pytest.raises(UserError, match=r"takes two responses, but there are up to 4 of a prompt"):
        make(world, objective=objective)
    phase = make(world, {"pairs": "best_worst"}, objective=objective)
    assert phase._train.num_responses == 2


def test_scores_that_drift_are_diagnosed(world):
    phase = make(world)
    assert phase.diagnose({"min_reward": -3.0, "max_reward": 2.0}) == []
    (found,) = phase.diagnose({"min_reward": -300.0, "max_reward": 2.0})
    assert "scores reach 300" in found


def test_a_checkpoint_is_exported_with_its_normalisation(world, tmp_path):
    """As the run exports it, when it is the last one."""
    config = make(world)._config.model_copy(update={"output_dir": str(tmp_path), "name": "run"})
    config = config.model_copy(update={"loop": LoopConfig(steps=2, tensorboard=False)})
    model_dir = run_phase(config, command="x")
    export_checkpoint(tmp_path / "run", tmp_path / "again")
    names = {path.name for path in model_dir.iterdir()}
    assert "reward.json" in names and names == {p.name for p in (tmp_path / "again").iterdir()}
    for name in names:
        assert (model_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
