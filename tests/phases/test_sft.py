"""SFT: its loss against log-softmax by hand, what must not change it, and that it learns."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import pack
from alignjax.losses import next_token_logps
from alignjax.phases import common
from alignjax.phases.sft import Sft, SftConfig
from alignjax.recipes import chains
from alignjax.sharding import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    chains.write(folder, seed=0, num_questions=600, num_drills=200, num_train=40, num_test=30)
    lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:700]))
    (folder / "held_out.jsonl").write_text("".join(lines[700:]))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    # Ragged prompts and completions.
    for i, line in enumerate(lines):
        line["answer"] = line["reference"] * (1 + i % 3)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make(world, data=None, sizes=(1, 1, 1), **changes):
    values = {
        "phase": "sft", "name": "x",
        "model": {"init": {
            "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2,
            "intermediate_size": 32, "rope_theta": 100.0, "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }},
        "tokenizer": str(world / "tokenizer"),
        "data": {
            "train": str(world / "pairs.jsonl"), "eval": str(world / "pairs.jsonl"),
            "text": {"fields": {"prompt": "prompt", "completion": "answer"}},
            "row_len": 48, "rows": 8, **(data or {}),
        },
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1},
        "loop": {"steps": 100},
        **changes,
    }  # fmt: skip
    mesh = make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
        jax.devices()[: math.prod(sizes)],
    )
    return Sft(SftConfig.model_validate(values), mesh)


def run(phase, num_steps, batches=None):
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seen = []
    for i in range(num_steps):
        state, collected = phase.collect(state, records)
        for batch in collected.batches if batches is None else [batches[i]]:
            state, metrics = phase.step(state, batch)
            seen.append(jax.device_get(metrics))
    return state, seen


def test_loss_is_the_negative_log_prob_of_the_completion_and_eos(world):
    """Example by example, unpacked and unpadded, shifted by hand."""
    phase = make(world)
    state = phase.init(jax.random.PRNGKey(3))
    model, tokenizer = phase._policy.model, phase._policy.tokenizer

    @jax.jit
    def log_probs(tokens):
        hidden, _ = model.apply(
            state.params, tokens[None], jnp.ones_like(tokens[None]), jnp.arange(len(tokens))[None]
        )
        return jax.nn.log_softmax(model.logits(state.params, hidden)[0])

    terms, hits, entropies = [], [], []
    for line in (world / "pairs.jsonl").read_text().splitlines()[:40]:
        record = json.loads(line)
        prompt = [tokenizer.bos_id, *tokenizer.encode(record["prompt"])]
        completion = [*tokenizer.encode(record["answer"]), tokenizer.eos_id]
        # Padded to one shape for one compilation; what comes after is not seen.
        ids = np.array(prompt + completion + [0] * (48 - len(prompt + completion)))
        logp = np.asarray(log_probs(ids), np.float64)
        for i, token in enumerate(completion):
            before = logp[len(prompt) + i - 1]
            terms.append(-before[token])
            hits.append(before[token] >= before.max())
            entropies.append(-(np.exp(before) * before).sum())
    seen = phase.evaluate(state).metrics
    assert seen["eval/loss"] == pytest.approx(np.mean(terms), rel=1e-5)
    assert seen["eval/mean_token_accuracy"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert seen["eval/entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert len(terms) != 0 and np.mean(terms) > 2


def test_it_learns(world):
    phase = make(
        world,
        {
            "train": str(world / "corpus.jsonl"), "eval": str(world / "held_out.jsonl"),
            "text": {"fields": {"completion": "text"}}, "row_len": 64, "rows": 16,
        },
    )  # fmt: skip
    state = phase.init(jax.random.PRNGKey(0))
    before = phase.evaluate(state).metrics["eval/loss"]
    state, seen = run(phase, 40)
    after = phase.evaluate(state).metrics["eval/loss"]
    assert before > 3.0, "about ln 23 at the start"
    assert after < 1.7
    assert seen[-1]["loss"] == pytest.approx(after, abs=0.2)


@pytest.fixture(scope="module")
def five_steps(world):
    """On one device, one micro-batch of 8 rows, packed."""
    state, seen = run(make(world), 5)
    return jax.device_get(state.params), seen


def assert_same(result, reference):
    state, seen = result
    params, expected = reference
    for got, want in zip(seen, expected, strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_8_devices_change_nothing(world, five_steps, sizes):
    assert_same(run(make(world, sizes=sizes), 5), five_steps)


def test_chunks_of_logits_grow_with_the_devices(world, monkeypatch):
    """Each device gets 1,024 rows of logits: with 8 rows over 4 shards, 512 time steps."""
    sizes = []

    def spy(*args, chunk_size, **options):
        sizes.append(chunk_size)
        return next_token_logps(*args, chunk_size=chunk_size, **options)

    monkeypatch.setattr(common, "next_token_logps", spy)
    phase = make(world, sizes=(2, 2, 2))
    state, _ = run(phase, 1)
    num_in_step = len(sizes)
    phase.evaluate(state)
    assert set(sizes) == {512} and len(sizes) > num_in_step > 0


def test_4_micro_batches_change_nothing(world, five_steps):
    assert_same(run(make(world, {"rows": 2, "micro_batches": 4}), 5), five_steps)


def test_packing_changes_nothing(world, five_steps):
    """The examples of each packed batch, laid out one to a row."""
    phase = make(world)
    records = phase.records()
    unpacked = []
    for _ in range(5):
        sequences = []
        batch = next(records)
        assert batch["segment_ids"].max() > 1, "the other side is packed indeed"
        for row in range(8):
            for segment in range(1, batch["segment_ids"][0, row].max() + 1):
                at = batch["segment_ids"][0, row] == segment
                sequences.append({k: batch[k][0, row][at] for k in ("tokens", "mask")})
        rows, used = pack(sequences, num_rows=24, row_len=48, packed=False)
        assert used == len(sequences) > 8
        unpacked.append({k: v[None] for k, v in rows.items()})
    assert_same(run(phase, 5, unpacked), five_steps)


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


def test_num_tokens_counts_all_but_padding(world):
    phase = make(world)
    _, collected = phase.collect(None, phase.records())
    (batch,) = collected.batches
    expected = int((np.array(batch["segment_ids"]) > 0).sum())
    assert collected.num_tokens == expected < batch["tokens"].size


def test_without_held_out_records_there_is_nothing_to_evaluate(world):
    phase = make(world, {"eval": None})
    assert phase.evaluate(phase.init(jax.random.PRNGKey(0))).metrics == {}


def test_rows_that_do_not_divide_over_the_devices(world):
    with pytest.raises(UserError, match=r"6 rows in a micro-batch do not divide over 4 devices"):
        make(world, {"rows": 6}, sizes=(2, 2, 1)).records()


def test_a_model_with_fewer_ids_than_the_tokenizer(world):
    with pytest.raises(UserError, match=r"the tokenizer has 23 ids, the model only 5; they do not"):
        make(world, model={"init": {"vocab_size": 5, "hidden_size": 16, "num_heads": 2}})


def test_a_new_model_needs_a_tokenizer(world):
    with pytest.raises(UserError, match="needs a tokenizer's directory"):
        make(world, tokenizer=None)


def test_bfloat16_parameters_learn_and_are_saved_as_they_are(world, tmp_path):
    """In the same number of steps as float32 ones in `test_it_learns`."""
    data = {
        "train": str(world / "corpus.jsonl"), "eval": str(world / "held_out.jsonl"),
        "text": {"fields": {"completion": "text"}}, "row_len": 64, "rows": 16,
        "micro_batches": 2,
    }  # fmt: skip
    phase = make(world, data)
    model = {"init": phase._config.model.init.model_dump(), "param_dtype": "bfloat16"}
    phase = make(world, data, model=model)
    state, _ = run(phase, 40)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.bfloat16.dtype}
    assert phase.evaluate(state).metrics["eval/loss"] < 1.7
    phase.export(state, tmp_path / "model")
    again = make(world, data, model={"path": str(tmp_path / "model"), "param_dtype": "bfloat16"})
    read = again.init(jax.random.PRNGKey(0)).params
    assert jax.tree.map(lambda x: x.dtype, read) == jax.tree.map(lambda x: x.dtype, state.params)
    jax.tree.map(np.testing.assert_array_equal, read, state.params)
    assert again._policy.model.compute_dtype == "float32", "on a CPU"


def test_experts_are_balanced_in_training_and_left_out_of_the_evaluation(world):
    """loss = cross-entropy + coefficient * balance, each as the model itself gives them."""
    shape = {
        "family": "qwen3_moe", "hidden_size": 16, "num_layers": 2, "num_heads": 2,
        "num_kv_heads": 2, "intermediate_size": 8, "num_experts": 4, "router_aux_coef": 0.5,
        "rope_theta": 100.0, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    phase = make(world, model={"init": shape})
    state = phase.init(jax.random.PRNGKey(0))
    state, collected = phase.collect(state, phase.records())
    batch = {name: array[0] for name, array in collected.batches[0].items()}
    model = phase._policy.model
    _, sums = jax.jit(model.apply_with_routing)(
        state.params, batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    is_real = np.asarray(batch["segment_ids"]) > 0
    assert sums.count == 2 * is_real.sum()
    balance = 4 * float(jnp.sum(sums.chosen * sums.probability)) / float(sums.count) ** 2
    plain = common.score_tokens(model, state.params, batch).logps
    mask = np.asarray(batch["mask"])
    cross_entropy = -float(jnp.sum(plain)) / mask.sum()
    before = phase.evaluate(state).metrics["eval/loss"]
    state, metrics = phase.step(state, collected.batches[0])
    assert metrics["aux_loss"] == pytest.approx(balance, rel=1e-5)
    assert metrics["loss"] == pytest.approx(cross_entropy + 0.5 * balance, rel=1e-5)
    assert before < metrics["loss"]
    for _ in range(30):
        state, metrics = phase.step(state, collected.batches[0])
    assert metrics["aux_loss"] < balance
    assert phase.evaluate(state).metrics["eval/loss"] < before
