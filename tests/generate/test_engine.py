"""The engine against the model run without a cache, one prompt at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.types import LENGTH, STOP, Sampling
from alignjax.generate import make_generate
from alignjax.generate.engine import bucket
from alignjax.losses import next_token_logps
from alignjax.models import Model, ModelConfig
from alignjax.sharding.mesh import MeshConfig, make_mesh

VOCAB = 11


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


def test_recorded_log_probs_are_those_of_the_uncached_model(policy):
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
    first = make_generate(policy[0])(policy[1], tokens[:1], lengths[:1], key, sampling)
    np.testing.assert_array_equal(whole.tokens, turns.tokens)
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


def test_the_ladder_of_buckets():
    assert [bucket(n) for n in (1, 8, 9, 13, 17, 25, 33, 49, 65, 100)] == [
        8, 8, 12, 16, 24, 32, 48, 64, 96, 128,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_tokens": tuple(range(9))}, "stop tokens"),
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
