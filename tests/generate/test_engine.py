"""The engine against the model run without a cache, one prompt at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from alignjax.core.types import LENGTH, STOP, Sampling
from alignjax.generate import decode, make_generate
from alignjax.generate.decode import num_compilations
from alignjax.generate.schedule import Ladder, bucket
from alignjax.losses import next_token_logps
from alignjax.models import Model, ModelConfig
from alignjax.sharding.mesh import BATCH_AXES, MeshConfig, make_mesh

VOCAB = 11
about_bits = pytest.mark.usefixtures("compiled_as_for_users")


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


@functools.partial(jax.jit, static_argnums=0)
def uncached_logits(model, params, tokens, lengths):
    """[B, T, V] of rows that are padded on the right; no cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    return model.logits(params, model.apply(params, tokens, segments, positions)[0])


def log_probs(policy, sequences, temperature=1.0, width=24):
    """[B, width, V] log-probs of what follows each token of some sequences."""
    tokens = np.zeros((-(-len(sequences) // 32) * 32, width), np.int32)
    lengths = np.ones(len(tokens), np.int32)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    logits = uncached_logits(*policy, tokens, lengths)
    return np.asarray(jax.nn.log_softmax(logits / temperature, axis=-1))


def whole(tokens, lengths, out, num_samples=1):
    """The prompt and what was sampled after it, of each row."""
    return [
        [*tokens[i // num_samples][: lengths[i // num_samples]], *ids[:n]]
        for i, (ids, n) in enumerate(zip(out.tokens, out.lengths, strict=True))
    ]


@about_bits
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_recorded_log_probs_are_those_of_the_uncached_model(policy, dtype):
    policy = policy[0], jax.tree.map(lambda x: x.astype(dtype), policy[1])
    tokens, lengths = prompts(5, 9)
    sampling = Sampling(temperature=0.8, max_tokens=6, stop_tokens=(3,), num_samples=4)
    out = make_generate(policy[0])(policy[1], tokens, lengths, jax.random.PRNGKey(1), sampling)
    assert out.tokens.shape == (20, 6)
    sequences = whole(tokens, lengths, out, 4)
    expected = log_probs(policy, sequences, 0.8)
    for row, ids in enumerate(sequences):
        start, n = lengths[row // 4], out.lengths[row]
        logps = expected[row, np.arange(start - 1, start + n - 1), ids[start:]]
        np.testing.assert_allclose(out.logps[row, :n], logps, atol=1e-5)
        assert np.all(out.tokens[row, n:] == 0)
        assert np.all(out.logps[row, n:] == 0)


@about_bits
def test_a_sharp_model_says_the_same_while_sampling_and_while_training():
    """Sharp attention makes a rounding error in one layer 100 times larger in the next."""
    model = Model(ModelConfig.tiny(VOCAB, tie_embeddings=False))
    engine, apply = make_generate(model), jax.jit(model.apply)
    for initializer_range, difference in ((0.1, 1e-5), (0.3, 1e-4)):
        sharp = Model(model.config.model_copy(update={"initializer_range": initializer_range}))
        params = sharp.init(jax.random.PRNGKey(0))
        assert _furthest(engine, apply, model, params) < difference


def _furthest(engine, apply, model, params):
    """Of log-probs of the sampler from those of the trainer."""
    tokens, lengths = prompts(32, 16)
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
    hidden, _ = apply(params, rows, jnp.ones_like(rows), positions)
    trained = next_token_logps(hidden, model.unembedding(params), jnp.array(rows), jnp.array(mask))
    return np.abs(trained.logps - logps).max()


def test_greedy_is_the_argmax_of_the_uncached_model(policy):
    tokens, lengths = prompts(4, 7, seed=1)
    out = make_generate(policy[0])(
        policy[1], tokens, lengths, jax.random.PRNGKey(0), Sampling(temperature=0.0, max_tokens=5)
    )
    sequences = whole(tokens, lengths, out)
    likely = log_probs(policy, sequences).argmax(-1)
    for row, ids in enumerate(sequences):
        start = lengths[row]
        np.testing.assert_array_equal(ids[start:], likely[row, start - 1 : start + 4])


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


@about_bits
def test_what_a_prompt_gets_does_not_depend_on_its_neighbours_or_on_turns(policy):
    tokens, lengths = prompts(6, 8)
    sampling = Sampling(max_tokens=7, stop_tokens=(2,), num_samples=2)
    key = jax.random.PRNGKey(5)
    all_of_them = make_generate(policy[0])(policy[1], tokens, lengths, key, sampling)
    turns = make_generate(policy[0], max_rows=4)(policy[1], tokens, lengths, key, sampling)
    halves = make_generate(policy[0], max_rows=1)(policy[1], tokens, lengths, key, sampling)
    first = make_generate(policy[0])(policy[1], tokens[:1], lengths[:1], key, sampling)
    assert {STOP, LENGTH} == set(all_of_them.finish_reasons.tolist())
    for other in (turns, halves):
        np.testing.assert_array_equal(all_of_them.tokens, other.tokens)
        np.testing.assert_array_equal(all_of_them.finish_reasons, other.finish_reasons)
    np.testing.assert_array_equal(all_of_them.tokens[:2], first.tokens)


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


@pytest.mark.parametrize("num_rows", [16, 24])
def test_rows_that_are_left_stay_on_their_device(num_rows):
    """24 rows do not divide into 8 devices with as many each: they are on all, and may move."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    rng = np.random.default_rng(0)
    array = rng.normal(size=(3, num_rows, 5)).astype(np.float32)
    source = np.repeat(np.arange(8), 2) * (num_rows // 8) + np.tile([1, -1], 8)
    source = np.where(np.tile([False, True], 8), -1, source).astype(np.int32)
    if num_rows == 24:
        array, source = array[:, :23], source[:11]
    spec = PartitionSpec(None, BATCH_AXES) if num_rows == 16 else PartitionSpec()
    split = NamedSharding(mesh, spec)
    take = jax.jit(lambda array, source: decode._taken(array, source, 1, mesh))
    given = jax.device_put(array, split)
    np.testing.assert_array_equal(
        np.asarray(take(given, source))[:, source >= 0], array[:, source[source >= 0]]
    )
    text = take.lower(given, source).compile().as_text()
    assert "all-gather" not in text and "all-reduce" not in text


@pytest.mark.slow
def test_eight_devices_let_go_of_rows_and_grow(policy):
    tokens, lengths = prompts(16, 8)
    sampling = Sampling(max_tokens=100, num_samples=4)
    limits = np.array([3, 3, 3, 90] * 4)  # A quarter stays on, on some devices more than on others.
    calls = [
        make_generate(policy[0], mesh=mesh)(
            policy[1], tokens, lengths, jax.random.PRNGKey(0), sampling, max_tokens=limits
        )
        for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    ]
    np.testing.assert_array_equal(calls[0].tokens, calls[1].tokens)
    np.testing.assert_allclose(calls[0].logps, calls[1].logps, atol=1e-4)


def test_only_the_rungs_of_a_ladder_are_compiled(policy):
    """Ragged calls, other settings, and rows that come and go meet the shapes of one ladder."""
    engine = make_generate(policy[0], max_rows=32)
    settings = [
        {},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 0.0, "top_k": 3},
        {"min_p": 0.1, "stop_tokens": (1, 2)},
    ]

    def call(seed):
        tokens, lengths = prompts(20 - seed, 8, seed=seed)
        sampling = Sampling(max_tokens=40 - seed, num_samples=3, **settings[seed])
        limits = np.random.default_rng(seed).integers(1, 41, len(tokens))
        engine(policy[1], tokens, lengths, jax.random.PRNGKey(seed), sampling, max_tokens=limits)

    for seed in range(4):
        ladder = Ladder.of(20 - seed, 8, 3, 40 - seed, max_rows=32, num_devices=1)
        assert (ladder.rows, ladder.first_capacity, ladder.capacity) == (32, 48, 48)
    before = num_compilations()
    for seed in range(4):
        call(seed)
    # Prompts are read, rows admitted, 32 or 16 of them go on, and 32 become 16.
    assert num_compilations() - before == 5


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
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
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


def test_rows_of_many_lengths_that_come_and_go_have_the_tokens_that_each_has_alone(policy):
    """More rows than slots, and more tokens than the first store holds, of rows that came later: it
    grows while the ring is somewhere within it."""
    tokens, lengths = prompts(8, 8, seed=3)
    limits = np.array([3, 2, 20, 40, 90, 70, 66, 1])
    sampling, key = Sampling(max_tokens=90, num_samples=4), jax.random.PRNGKey(7)
    engine = make_generate(policy[0], max_rows=16)
    out = engine(policy[1], tokens, lengths, key, sampling, max_tokens=limits)
    np.testing.assert_array_equal(out.lengths, np.repeat(limits, 4))
    at_once = make_generate(policy[0])(policy[1], tokens, lengths, key, sampling)
    for row, n in enumerate(out.lengths):
        np.testing.assert_array_equal(out.tokens[row, :n], at_once.tokens[row, :n])
        np.testing.assert_allclose(out.logps[row, :n], at_once.logps[row, :n], atol=1e-5)
        assert not out.tokens[row, n:].any() and not out.logps[row, n:].any()
    expected = log_probs(policy, whole(tokens, lengths, at_once, 4), width=100)
    for row in range(32):
        start = lengths[row // 4]
        logps = expected[row, np.arange(start - 1, start + 89), at_once.tokens[row]]
        np.testing.assert_allclose(at_once.logps[row], logps, atol=1e-5)
