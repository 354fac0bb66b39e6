"""The engine against the model run without a cache, one prompt at a time."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.types import LENGTH, STOP, Sampling
from alignjax.generate import make_generate
from alignjax.generate.decode import Limits, decode
from alignjax.generate.engine import bucket
from alignjax.losses import next_token_logps
from alignjax.models import Model, ModelConfig
from alignjax.sharding.mesh import MeshConfig, make_mesh

VOCAB = 11
pytestmark = pytest.mark.usefixtures("compiled_as_for_users")


@pytest.fixture(scope="module")
def policy():
    model = Model(ModelConfig.tiny(VOCAB, hidden_size=32, num_kv_heads=2))
    params = model.init(jax.random.PRNGKey(0))
    # At initialisation all tokens are about as likely; sharpen them so that mistakes show.
    params["embedding"] = jax.tree.map(lambda x: x * 5, params["embedding"])
    return model, params


def prompts(num, width, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, num)
    return rng.integers(0, VOCAB, (num, width)).astype(np.int32), lengths.astype(np.int32)


def log_probs(policy, ids, temperature=1.0):
    """[T, V] log-probs of what follows each token of one sequence; no cache, no padding."""
    model, params = policy
    tokens = jnp.array([ids])
    hidden, _ = model.apply(params, tokens, jnp.ones_like(tokens), jnp.arange(len(ids))[None])
    return jax.nn.log_softmax(model.logits(params, hidden)[0] / temperature, axis=-1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recorded_log_probs_are_those_of_the_uncached_model(policy, dtype):
    policy = policy[0], jax.tree.map(lambda x: x.astype(dtype), policy[1])
    tokens, lengths = prompts(5, 9)
    sampling = Sampling(temperature=0.8, max_tokens=6, stop_tokens=(3,), num_samples=4)
    out = make_generate(policy[0])(policy[1], tokens, lengths, jax.random.PRNGKey(1), sampling)
    assert out.tokens.shape == (20, 6)
    for row in range(20):
        prompt = list(tokens[row // 4][: lengths[row // 4]])
        completion = list(out.tokens[row][: out.lengths[row]])
        expected = log_probs(policy, prompt + completion, 0.8)[len(prompt) - 1 : -1]
        expected = expected[np.arange(len(completion)), completion]
        np.testing.assert_allclose(out.logps[row][: len(completion)], expected, atol=1e-5)
        assert np.all(out.tokens[row][len(completion) :] == 0)
        assert np.all(out.logps[row][len(completion) :] == 0)


def test_a_sharp_model_says_the_same_while_sampling_and_while_training():
    """Sharp attention makes a rounding error in one layer 100 times larger in the next. Where the
    hidden states of both have the same bits, what is left is the rounding of a log-sum-exp."""
    model = Model(ModelConfig.tiny(VOCAB, initializer_range=0.3, tie_embeddings=False))
    params = model.init(jax.random.PRNGKey(0))
    tokens, lengths = prompts(32, 16)
    engine = make_generate(model)
    out = engine(
        params, tokens, lengths, jax.random.PRNGKey(1), Sampling(max_tokens=48, num_samples=8)
    )
    rows = np.zeros((256, 64), np.int32)
    mask = np.zeros(rows.shape, bool)
    logps = np.zeros(rows.shape, np.float32)
    for row, (ids, n) in enumerate(zip(out.tokens, out.lengths, strict=True)):
        start = lengths[row // 8]
        rows[row, : start + n] = [*tokens[row // 8][:start], *ids[:n]]
        mask[row, start : start + n] = True
        logps[row, start : start + n] = out.logps[row][:n]
    positions = jnp.broadcast_to(jnp.arange(64), rows.shape)
    hidden, _ = jax.jit(model.apply)(params, rows, jnp.ones_like(rows), positions)
    trained = next_token_logps(hidden, model.unembedding(params), jnp.array(rows), jnp.array(mask))
    assert np.abs(trained.logps - logps).max() < 1e-5


def test_greedy_is_the_argmax_of_the_uncached_model(policy):
    tokens, lengths = prompts(4, 7, seed=1)
    out = make_generate(policy[0])(
        policy[1], tokens, lengths, jax.random.PRNGKey(0), Sampling(temperature=0.0, max_tokens=5)
    )
    for row in range(4):
        ids = list(tokens[row][: lengths[row]])
        for _ in range(5):
            ids.append(int(log_probs(policy, ids)[-1].argmax()))
        assert list(out.tokens[row]) == ids[lengths[row] :]


def test_the_stop_token_is_kept_counted_and_ends_the_row(policy):
    tokens, lengths = prompts(16, 5)
    stops = (3, 7)
    out = make_generate(policy[0])(
        policy[1], tokens, lengths, jax.random.PRNGKey(2),
        Sampling(max_tokens=8, stop_tokens=stops, num_samples=4),
    )  # fmt: skip
    assert {STOP, LENGTH} == set(out.finish_reasons.tolist())
    for ids, length, reason in zip(out.tokens, out.lengths, out.finish_reasons, strict=True):
        assert not np.isin(ids[: length - 1], stops).any()
        assert np.isin(ids[length - 1], stops) == (reason == STOP)
        assert length == 8 or reason == STOP


def test_samples_of_a_prompt_differ_and_the_key_decides_them(policy):
    tokens, lengths = prompts(3, 5)
    engine = make_generate(policy[0])
    sampling = Sampling(max_tokens=12, num_samples=8)
    one = engine(policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling)
    same = engine(policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling)
    other = engine(policy[1], tokens, lengths, jax.random.PRNGKey(1), sampling)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert len({tuple(row) for row in one.tokens[:8]}) == 8
    assert not np.array_equal(one.tokens, other.tokens)


def test_what_a_prompt_gets_does_not_depend_on_its_neighbours_or_on_turns(policy):
    tokens, lengths = prompts(6, 8)
    sampling = Sampling(max_tokens=7, stop_tokens=(2,), num_samples=2)
    key = jax.random.PRNGKey(5)
    whole = make_generate(policy[0])(policy[1], tokens, lengths, key, sampling)
    turns = make_generate(policy[0], max_rows=4)(policy[1], tokens, lengths, key, sampling)
    halves = make_generate(policy[0], max_rows=1)(policy[1], tokens, lengths, key, sampling)
    first = make_generate(policy[0])(policy[1], tokens[:1], lengths[:1], key, sampling)
    np.testing.assert_array_equal(whole.tokens, turns.tokens)
    np.testing.assert_array_equal(whole.tokens, halves.tokens)
    np.testing.assert_array_equal(whole.tokens[:2], first.tokens)


def test_eight_devices_sample_what_one_does(policy):
    tokens, lengths = prompts(6, 8)
    sampling = Sampling(max_tokens=7, stop_tokens=(2,), num_samples=2)
    one = make_generate(policy[0])(policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling)
    mesh = make_mesh(MeshConfig(data=8))
    many = make_generate(policy[0], mesh=mesh)(
        policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling
    )
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.logps, many.logps, atol=1e-5)


def test_ragged_calls_and_new_sampling_parameters_do_not_recompile(policy):
    engine = make_generate(policy[0])
    for seed, (temperature, top_p, max_tokens) in enumerate(
        [(1.0, 1.0, 8), (0.5, 0.9, 7), (0.0, 1.0, 8)]
    ):
        tokens, lengths = prompts(7 + seed % 2, 8, seed=seed)
        sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        engine(policy[1], tokens, lengths, jax.random.PRNGKey(seed), sampling)
    assert engine.num_compilations == 1


@pytest.fixture
def computed(policy, monkeypatch):
    """Called with how to sample: the rows of tokens that each turn computes, padding included."""

    def count(num_prompts, num_samples, max_rows, num_devices=1):
        rows = []

        def fake(params, prompts, lengths, row_keys, limits, *, num_samples, capacity):
            rows.append(len(prompts) * num_samples)
            assert row_keys.shape == (rows[-1], 2)
            return (
                jnp.broadcast_to(row_keys[:, 1:], (rows[-1], capacity)),
                jnp.zeros((rows[-1], capacity)), jnp.ones(rows[-1]), jnp.ones(rows[-1], bool),
            )  # fmt: skip

        mesh = make_mesh(MeshConfig(data=num_devices), jax.devices()[:num_devices])
        engine = make_generate(policy[0], mesh=mesh, max_rows=max_rows)
        monkeypatch.setattr(engine, "_decode", fake)
        key = jax.random.PRNGKey(0)
        out = engine(policy[1], *prompts(num_prompts, 4), key, Sampling(num_samples=num_samples))
        # However they are split, row i has the i-th key.
        keys = [jax.random.fold_in(key, i)[1] for i in range(num_prompts * num_samples)]
        np.testing.assert_array_equal(out.tokens[:, 0].astype(np.uint32), keys)
        return rows

    return count


@pytest.mark.parametrize(
    ("num_prompts", "num_samples", "max_rows", "num_devices", "rows"),
    [
        (1, 64, 1024, 1, [64]),  # a few prompts with many samples each
        (3, 16, 1024, 1, [48]),
        (1, 1, 1024, 1, [8]),
        (3, 2, 1024, 1, [8]),
        (64, 4, 128, 1, [128, 128]),
        (40, 8, 100, 1, [96, 96, 96, 32]),
        (3, 2, 4, 1, [4, 4]),
        (5, 1, 3, 1, [3, 3]),
        (3, 16, 8, 1, [8] * 6),  # G > max_rows
        (2, 7, 6, 1, [6, 6, 6]),
        (1, 64, 1024, 8, [64]),
        (6, 2, 1024, 8, [16]),
        (4, 16, 32, 8, [32, 32]),
        (9, 1, 1, 8, [8, 8]),  # never fewer than one row on each device
    ],
)
def test_no_more_rows_are_computed_than_max_rows_and_few_in_vain(
    computed, num_prompts, num_samples, max_rows, num_devices, rows
):
    assert computed(num_prompts, num_samples, max_rows, num_devices) == rows


def test_rows_that_fill_the_batch_up_are_not_waited_for(policy):
    """Every token is a stop token, so that the prefill is the only call of the model."""
    model, params = policy
    calls = []

    def apply(*args):
        jax.debug.callback(lambda: calls.append(1))
        return model.apply(*args)

    counting = SimpleNamespace(apply=apply, init_cache=model.init_cache, logits=model.logits)
    limits = Limits(
        jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.int32(6), stop_tokens=jnp.arange(VOCAB)
    )
    tokens, logps, lengths, is_stopped = decode(
        params, jnp.zeros((2, 4), jnp.int32), jnp.array([3, 0]), jnp.zeros((4, 2), jnp.uint32),
        limits, model=counting, num_samples=2, capacity=8,
    )  # fmt: skip
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_array_equal(lengths, [1, 1, 0, 0])
    assert not tokens[2:].any() and not logps[2:].any() and is_stopped.all()


def test_a_completion_may_fill_the_context_to_its_end(policy):
    tokens, lengths = np.ones((1, 500), np.int32), np.array([500])
    sampling = Sampling(max_tokens=12)
    out = make_generate(policy[0])(policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling)
    assert out.lengths == 12
    with pytest.raises(ValueError, match="context of 512"):
        make_generate(policy[0])(
            policy[1], tokens, lengths, jax.random.PRNGKey(0), Sampling(max_tokens=13)
        )


def test_any_top_k_from_the_vocabulary_on_keeps_all(policy):
    tokens, lengths = prompts(2, 4)
    all_of_them, more = (
        make_generate(policy[0])(
            policy[1], tokens, lengths, jax.random.PRNGKey(0), Sampling(top_k=top_k, max_tokens=4)
        )
        for top_k in (0, 2**31)
    )
    np.testing.assert_array_equal(all_of_them.tokens, more.tokens)


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_ids_that_the_model_has_not_are_refused_but_in_padding(policy, wrong):
    tokens = np.array([[1, 2, 3], [1, wrong, wrong]], np.int32)
    engine, sampling = make_generate(policy[0]), Sampling(max_tokens=4)
    out = engine(policy[1], tokens, np.array([3, 1]), jax.random.PRNGKey(0), sampling)
    assert np.isfinite(out.logps).all()
    with pytest.raises(ValueError, match=f"id {wrong} in row 1, column 1; .* 0 to 10"):
        engine(policy[1], tokens, np.array([3, 2]), jax.random.PRNGKey(0), sampling)


def test_the_ladder_of_buckets():
    assert [bucket(n, smallest=1) for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 4, 6, 8]
    assert [bucket(n) for n in (1, 8, 9, 13, 17, 25, 33, 49, 65, 100)] == [
        8, 8, 12, 16, 24, 32, 48, 64, 96, 128,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"temperature": float("nan")}, "finite temperature"),
        ({"temperature": float("inf")}, "finite temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_tokens": tuple(range(17))}, "stop tokens"),
        ({"max_tokens": 600}, "context of 512"),
    ],
)
def test_settings_that_make_no_sense_are_refused(policy, change, message):
    tokens, lengths = prompts(2, 4)
    sampling = dataclasses.replace(Sampling(max_tokens=4), **change)
    with pytest.raises(ValueError, match=message):
        make_generate(policy[0])(policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling)


def test_an_empty_prompt_is_refused(policy):
    with pytest.raises(ValueError, match="bos"):
        make_generate(policy[0])(
            policy[1],
            np.zeros((2, 4), np.int32),
            np.array([0, 3]),
            jax.random.PRNGKey(0),
            Sampling(),
        )
