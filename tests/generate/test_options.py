"""What shapes a completion beside temperature: by the model without a cache and NumPy alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.types import ABORTED, LENGTH, STOP, Sampling
from alignjax.generate import make_generate
from alignjax.models import Model, ModelConfig, lora
from alignjax.models.lora import LoraConfig

VOCAB, WIDTH = 11, 32
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (6, 8)).astype(np.int32)
LENGTHS = np.array([1, 8, 3, 5, 8, 2])
KEY = jax.random.PRNGKey(3)
APPLY = jax.jit(Model.apply, static_argnums=0)


@pytest.fixture(scope="module")
def policy():
    model = Model(ModelConfig.tiny(VOCAB, hidden_size=32, num_kv_heads=2))
    params = model.init(jax.random.PRNGKey(0))
    params["embedding"] = jax.tree.map(lambda x: x * 5, params["embedding"])
    return model, params


@pytest.fixture(scope="module")
def sample(policy):
    engine = make_generate(policy[0])
    return lambda sampling, **how: engine(policy[1], TOKENS, LENGTHS, KEY, sampling, **how)


def oracle(logits, seen, sampling):
    """[V] float64 log-probs of one distribution, -inf where nothing is drawn; from definitions."""
    logits = logits.astype(np.float64)
    penalty = sampling.repetition_penalty
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    logits[list(sampling.banned_tokens)] = -np.inf
    logits /= sampling.temperature
    order = sorted(range(VOCAB), key=lambda i: (-logits[i], i))[: sampling.top_k or None]
    probs = np.exp(logits[order] - logits.max())
    probs /= probs.sum()
    keep = np.r_[0, probs.cumsum()[:-1]] < sampling.top_p
    keep &= probs >= sampling.min_p * probs[0]
    out = np.full(VOCAB, -np.inf)
    out[np.array(order)[keep]] = np.log(probs[keep] / probs[keep].sum())
    return out


def test_all_of_them_at_once_give_the_distribution_of_their_definitions(policy, sample):
    sampling = Sampling(
        temperature=0.7, top_k=8, top_p=0.95, min_p=0.02, repetition_penalty=1.5,
        banned_tokens=(4, 9), forced_tokens=(2, 9, 2), stop_tokens=(6,),
        stop_sequences=((5, 3), (0, 0), (7, 1, 7, 1, 7, 1, 7, 1, 7)), max_tokens=20, num_samples=8,
    )  # fmt: skip
    out = sample(sampling)
    model, params = policy
    rows = np.zeros((48, WIDTH), np.int32)
    for row in range(48):
        start, n = LENGTHS[row // 8], out.lengths[row]
        rows[row, : start + n] = [*TOKENS[row // 8][:start], *out.tokens[row, :n]]
    positions = jnp.broadcast_to(jnp.arange(WIDTH), rows.shape)
    hidden, _ = APPLY(model, params, rows, jnp.ones_like(rows), positions)
    logits = np.asarray(model.logits(params, hidden))
    ends = [(6,), *sampling.stop_sequences]
    kinds = set()
    for row in range(48):
        start, n, ids = LENGTHS[row // 8], out.lengths[row], out.tokens[row].tolist()
        assert ids[:3] == [2, 9, 2]
        for t in range(n):
            at = start + t - 1
            seen = np.unique(rows[row, : at + 1])
            if t < 3:  # of the model itself
                plain = logits[row, at].astype(np.float64) / 0.7
                expected = plain - np.log(np.exp(plain).sum())
            else:
                expected = oracle(logits[row, at], seen, sampling)
            assert out.logps[row, t] == pytest.approx(expected[ids[t]], abs=2e-5)
            found = [end for end in ends if tuple(ids[: t + 1][-len(end) :]) == end]
            assert bool(found) == (t == n - 1 and out.finish_reasons[row] == STOP)
            kinds |= {len(end) for end in found}
        assert n == 20 or out.finish_reasons[row] == STOP
    assert {1, 2} <= kinds, "no sequence and no token ended a row: choose other ones"


def test_a_long_stop_sequence_ends_a_row_and_only_within_the_completion(policy, sample):
    """What greedy decoding gives, cut after any of its parts; the prompt is no part of it."""
    free = sample(Sampling(temperature=0.0, max_tokens=20))
    sequence = tuple(free.tokens[0, :12].tolist())
    out = sample(Sampling(temperature=0.0, max_tokens=20, stop_sequences=(sequence, (VOCAB, 1))))
    assert out.lengths[0] == 12 and out.finish_reasons[0] == STOP
    # The end of prompt 1 with the first token after it is no sequence of the completion.
    across = (int(TOKENS[1, 7]), int(free.tokens[1, 0]))
    out = sample(Sampling(temperature=0.0, max_tokens=20, stop_sequences=(across, sequence)))
    ids = free.tokens[1].tolist()
    first = next((i + 2 for i in range(19) if tuple(ids[i : i + 2]) == across), 20)
    assert out.lengths[1] == first


def test_seeds_decide_the_samples_of_a_prompt_wherever_it_stands(policy, sample):
    sampling = Sampling(max_tokens=20, num_samples=2)
    seeds = np.array([7, 1, 2, 9, 7, 3])
    out = sample(sampling, seeds=seeds)
    order = np.array([4, 2, 0, 1, 3, 5])
    moved = make_generate(policy[0])(
        policy[1], TOKENS[order], LENGTHS[order], KEY, sampling, seeds=seeds[order]
    )
    expected = out.tokens.reshape(6, 2, -1)[order].reshape(12, -1)
    np.testing.assert_array_equal(moved.tokens, expected)
    assert not np.array_equal(out.tokens, sample(sampling).tokens)


def test_each_token_is_drawn_by_itself(sample):
    """Where all are as likely, two neighbours are the same once in 11."""
    out = sample(Sampling(temperature=1e4, max_tokens=20, num_samples=2))
    assert 0 < (out.tokens[:, 1:] == out.tokens[:, :-1]).mean() < 0.2


def test_who_watches_gets_every_token_and_may_end_rows(policy, sample):
    sampling = Sampling(max_tokens=20, num_samples=2)
    whole, seen, dones = sample(sampling), {}, []

    def watch(progress):
        for row, ids in progress.tokens.items():
            seen.setdefault(row, []).extend(ids.tolist())
        dones.append(progress.num_done)
        return [3, 5] if len(dones) == 1 else None

    out = sample(sampling, on_tokens=watch)
    assert len(dones) > 1 and dones == sorted(dones)
    for row in range(12):
        n = out.lengths[row]
        np.testing.assert_array_equal(out.tokens[row, :n], whole.tokens[row, :n])
        assert seen[row] == whole.tokens[row, :n].tolist()
        assert out.finish_reasons[row] == (ABORTED if row in (3, 5) else LENGTH)
        assert (n < 20) == (row in (3, 5)) and not out.tokens[row, n:].any()


def test_what_a_watcher_raises_ends_the_call(sample):
    class EnoughError(Exception):
        pass

    def watch(progress):
        raise EnoughError

    with pytest.raises(EnoughError):
        sample(Sampling(max_tokens=20, num_samples=2), on_tokens=watch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop_sequences": ((1,), ())}, "one is empty"),
        ({"banned_tokens": (3, VOCAB)}, "banned_tokens: id 11; the model has ids 0 to 10"),
        ({"banned_tokens": tuple(range(VOCAB))}, "leave at least one"),
        ({"forced_tokens": (-1,)}, "forced_tokens: id -1"),
        ({"forced_tokens": (1,) * 21}, "21 forced tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(sample, change, message):
    with pytest.raises(ValueError, match=message):
        sample(Sampling(**({"max_tokens": 20} | change)))


@pytest.mark.parametrize("how", [{"seeds": np.array([1])}, {"max_tokens": np.zeros(6, int)}])
def test_numbers_that_are_not_one_for_each_prompt_are_refused(sample, how):
    with pytest.raises(ValueError, match="one for each prompt"):
        sample(Sampling(max_tokens=20), **how)


def recorded_and_expected(out, model, params, temperature=1.0):
    """Log-probs [12, 20] as recorded, and of a model without a cache."""
    rows = np.zeros((12, WIDTH), np.int32)
    for row in range(12):
        start = LENGTHS[row // 2]
        rows[row, : start + 20] = [*TOKENS[row // 2][:start], *out.tokens[row]]
    positions = jnp.broadcast_to(jnp.arange(WIDTH), rows.shape)
    hidden, _ = APPLY(model, params, rows, jnp.ones_like(rows), positions)
    logps = np.asarray(jax.nn.log_softmax(model.logits(params, hidden) / temperature))
    at = np.repeat(LENGTHS, 2)[:, None] - 1 + np.arange(20)
    return out.logps, logps[np.arange(12)[:, None], at, out.tokens]


def test_keys_and_values_as_codes_change_log_probs_a_little(policy):
    engine = make_generate(policy[0], int8_kv=True)
    out = engine(policy[1], TOKENS, LENGTHS, KEY, Sampling(max_tokens=20, num_samples=2))
    recorded, expected = recorded_and_expected(out, *policy)
    assert 1e-4 < np.abs(recorded - expected).max() < 0.1


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_as_codes_are_those_of_the_last_update(policy, adapted):
    """Rollouts are of the parameters of the call, adapters included, never of those before."""
    model, params = policy
    if adapted:
        model = dataclasses.replace(model, lora=LoraConfig(rank=2))
        params = lora.combine(params, lora.init(model, params, jax.random.PRNGKey(1)))
    coded = dataclasses.replace(model, quantize="int8")
    quantize = jax.jit(lora.quantize_base, static_argnums=0)
    engine = make_generate(model, int8_weights=True)
    for change in (1.0, 1.5):
        # An update of the adapters where there are some, else of the weights.
        params = jax.tree.map_with_path(
            lambda path, x, c=change: (
                x * c + (c - 1) * ("lora" in str(path)) / 64
                if not adapted or "lora" in str(path)
                else x
            ),
            params,
        )
        out = engine(params, TOKENS, LENGTHS, KEY, Sampling(max_tokens=20, num_samples=2))
        recorded, expected = recorded_and_expected(out, coded, quantize(coded, params))
        np.testing.assert_allclose(recorded, expected, atol=2e-5)
        _, plain = recorded_and_expected(out, model, params)
        assert 1e-4 < np.abs(recorded - plain).max() < 0.5
