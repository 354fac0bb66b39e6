"""Every loss by name against log-probs worked out alone, text by text; metrics by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.data import TextOptions, comparison_encoder, open_preferences, pairs
from alignjax.data.comparison_rows import comparison_rows
from alignjax.models import Model, ModelConfig
from alignjax.phases.preference_config import LOSSES, Objective, Part
from alignjax.phases.preference_loss import (
    Scorer,
    mismatch_kl,
    pair_loss,
    reference_logps,
    single_loss,
)
from alignjax.text import load_tokenizer
from tests.phases.preferences import MODEL, write_world

NUM = 12


class First:
    """The first few places of a view."""

    def __init__(self, view):
        self._view = view

    def __len__(self):
        return NUM

    def __getitem__(self, index):
        return self._view[index]

    def where(self, index):
        return self._view.where(index)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def case(world):
    """A model, two sets of weights, elements, and the log-probs of all their tokens, plainly."""
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    preferences = open_preferences(str(world / "pairs.jsonl"))
    view = First(pairs(preferences))
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, **MODEL))
    params, ref = (model.init(jax.random.key(i)) for i in (0, 1))

    encode = comparison_encoder(TextOptions(), tokenizer)

    @jax.jit
    def by_token(params, ids):
        hidden, _ = model.apply(params, ids[None], jnp.ones_like(ids[None]), jnp.arange(32)[None])
        return jax.nn.log_softmax(model.logits(params, hidden)[0])

    def tokens_of(params):
        found = []
        for i in range(NUM):
            element = encode(view[i])
            for completion in element.completions:
                ids = np.concatenate([element.prompt, completion])
                logp = np.asarray(by_token(params, np.pad(ids, (0, 32 - len(ids)))), np.float64)
                places = np.arange(len(element.prompt), len(ids))
                rows = logp[places - 1]
                found.append((rows[np.arange(len(places)), ids[places]], rows))
        return found

    return {
        "model": model, "params": params, "ref": ref, "view": view, "encode": encode,
        "tokens": tokens_of(params), "ref_tokens": tokens_of(ref),
    }  # fmt: skip


def rows_of(case, *, shared_prompt, packed=True, num_micro_batches=1, row_len=48, **more):
    (batch,) = comparison_rows(
        case["view"], case["encode"],
        num_prompts=NUM, num_micro_batches=num_micro_batches, row_len=row_len, num_responses=2,
        shared_prompt=shared_prompt, packed=packed, shuffle=False, num_epochs=1,
    )  # fmt: skip
    return {**batch, **more}


def expected_pairs(case, alpha=1.0):
    """Float64 sums, in the order of the data."""

    def sums(tokens):
        weighted = []
        for i, (logp, _) in enumerate(tokens):
            shorter = min(len(logp), len(tokens[i ^ 1][0]))
            weighted.append(logp[:shorter].sum() + alpha * logp[shorter:].sum())
        return np.array(weighted).reshape(NUM, 2)

    lengths = np.array([len(logp) for logp, _ in case["tokens"]], np.int32).reshape(NUM, 2)
    policy, ref = sums(case["tokens"]), sums(case["ref_tokens"])
    arrays = (policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1])
    return losses.Pairs(
        *(jnp.asarray(x, jnp.float32) for x in arrays), lengths[:, 0], lengths[:, 1],
        np.ones(NUM, bool),
    )  # fmt: skip


def scorer_of(case, **options):
    options = {"shared_prompt": True, "num_shards": 1} | options
    return Scorer(case["model"], **options)


@pytest.mark.parametrize(("shared_prompt", "packed"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_sums_of_each_completion(case, shared_prompt, packed, alpha):
    batch = rows_of(case, shared_prompt=shared_prompt, packed=packed, row_len=64)
    scorer = scorer_of(case, shared_prompt=shared_prompt, length_alpha=alpha)
    found = np.asarray(jax.jit(functools.partial(reference_logps, scorer))(case["params"], batch))
    pairs = expected_pairs(case, alpha)
    order = batch["index"][batch["index"] >= 0]
    assert sorted(order) == list(range(NUM))
    by_place = found[batch["index"] >= 0][np.argsort(order)]
    np.testing.assert_allclose(by_place[:, 0], pairs.chosen, rtol=2e-5)
    np.testing.assert_allclose(by_place[:, 1], pairs.rejected, rtol=2e-5)
    assert not found[batch["index"] < 0].any()
    assert len(set(map(int, pairs.chosen_len))) > 2, "ragged"


DELTA, KL = 0.3, 0.7
PAIR_LOSSES = [name for name, loss in LOSSES.items() if not loss.is_unpaired]


def expected_inputs(case):
    prob = np.linspace(0.1, 0.9, NUM, dtype=np.float32)
    aligned = [
        np.exp(np.mean(logp - np.log(np.sum(np.exp(rows) ** 2, axis=-1))))
        for logp, rows in case["tokens"]
    ]
    return {
        "pairs": expected_pairs(case), "preference_prob": prob, "delta": jnp.float32(DELTA),
        "weights": np.prod(np.reshape(aligned, (NUM, 2)), axis=1).astype(np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_each_loss_of_pairs_takes_what_its_function_does(case, name):
    """The sums that the model makes are those of the test above."""
    inputs = expected_inputs(case)
    loss = LOSSES[name]
    own = [inputs[key] for key in loss.takes]
    part = Part(1.0, loss, {})
    expected = getattr(losses, name)(*own)
    np.testing.assert_array_equal(part(inputs), expected)
    gradient = jax.grad(lambda p: jnp.sum(part(inputs | {"pairs": p})), allow_int=True)(own[0])
    assert np.isfinite(expected).all() and np.isfinite(gradient.chosen).all()
    assert np.abs(gradient.chosen).max() > 0


def test_the_sum_of_all_losses_of_pairs_at_once(case):
    """What each of them takes comes through the rows as it is; weights; a finite gradient."""
    inputs = expected_inputs(case)
    options = {"dpo": {"beta": 0.2}, "bco": {"beta": 0.01}, "wpo": {"max_weight": np.inf}}
    parts = tuple(Part(1.0, LOSSES[name], options.get(name, {})) for name in PAIR_LOSSES)
    expected_each = [float(np.sum(part(inputs))) for part in parts]
    weights = jnp.linspace(0.5, 1.5, len(parts))
    batch = {name: x[0] for name, x in rows_of(case, shared_prompt=True).items()}
    is_there = batch["index"] >= 0
    place = np.maximum(batch["index"], 0)
    pairs = inputs["pairs"]
    ref = np.stack([pairs.ref_chosen, pairs.ref_rejected], -1)[place]
    batch |= {
        "ref_logps": np.where(is_there[..., None], ref, 0.0).astype(np.float32),
        "preference_prob": np.where(is_there, inputs["preference_prob"][place], 0.0),
        "delta": jnp.float32(DELTA),
    }
    scorer = scorer_of(case, with_log_collision=True)

    @jax.jit
    def run(params, weights):
        def total(params, weights):
            weighted = (
                Part(w, part.loss, part.options) for w, part in zip(weights, parts, strict=True)
            )
            objective = Objective(tuple(weighted), 1.0)
            loss, metrics = pair_loss(scorer, objective, params, batch)
            return loss.total, (loss.weight, metrics)

        return jax.value_and_grad(total, (0, 1), has_aux=True)(params, weights)

    (total, (weight, metrics)), (gradient, by_weight) = run(case["params"], weights)
    assert float(weight) == NUM
    # By the weight of a loss the sum has that loss for its derivative.
    for name, found, expected in zip(PAIR_LOSSES, by_weight, expected_each, strict=True):
        np.testing.assert_allclose(found, expected, rtol=3e-4, err_msg=name)
    np.testing.assert_allclose(total, np.dot(weights, expected_each), rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

    # Metrics: of the first loss, whose beta is 0.2.
    gains = [np.asarray(a) - np.asarray(b) for a, b in
             ((pairs.chosen, pairs.ref_chosen), (pairs.rejected, pairs.ref_rejected))]  # fmt: skip
    expected = {
        "delta": 0.01 * np.mean(gains),
        "rewards/chosen": 0.2 * gains[0].mean(), "rewards/rejected": 0.2 * gains[1].mean(),
        "rewards/margins": 0.2 * (gains[0] - gains[1]).mean(),
        "rewards/accuracies": (gains[0] > gains[1]).mean(),
        "logps/chosen": np.mean(pairs.chosen), "logps/rejected": np.mean(pairs.rejected),
        "nll_loss": -np.sum(pairs.chosen) / np.sum(pairs.chosen_len),
    }  # fmt: skip
    means = {name: float(m.total / m.weight) for name, m in metrics.items()}
    assert means == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4, abs=1e-6)
    assert 0 < means["rewards/accuracies"] < 1, "else a wrong sign might not show"


def test_rewards_of_losses_without_reference_are_of_means(case):
    objective = Objective((Part(1.0, LOSSES["simpo"], {"beta": 2.0}),), 1.0)
    batch = {name: x[0] for name, x in rows_of(case, shared_prompt=True).items()}
    run = jax.jit(functools.partial(pair_loss, scorer_of(case), objective))
    loss, metrics = run(case["params"], batch)
    pairs = expected_pairs(case)
    expected = float(np.mean(pairs.chosen / pairs.chosen_len)) * 2.0
    found = metrics["rewards/chosen"]
    assert float(found.total / found.weight) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(loss.total, np.sum(losses.simpo(pairs)), rtol=1e-4)


def test_kto_and_its_kl(case):
    """The first completion of each element is judged, the second one is of another prompt."""
    objective = Objective(
        (Part(1.0, LOSSES["kto"], {"beta": 0.2, "undesirable_weight": 1.5}),), 1.0
    )
    batch = {name: x[0] for name, x in rows_of(case, shared_prompt=True).items()}
    pairs = expected_pairs(case)
    place, is_there = np.maximum(batch["index"], 0), batch["index"] >= 0
    ref = np.stack([pairs.ref_chosen, pairs.ref_rejected], -1)[place]
    is_desirable = np.arange(NUM) % 3 == 0
    batch |= {
        "ref_logps": np.where(is_there[..., None], ref, 0.0).astype(np.float32),
        "labels": is_desirable[place], "kl": jnp.float32(KL),
    }  # fmt: skip
    run = jax.jit(functools.partial(single_loss, scorer_of(case), objective))
    loss, metrics = run(case["params"], batch)
    gains = np.asarray(pairs.chosen - pairs.ref_chosen, np.float64)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    z = 0.2 * (gains - KL)
    expected = np.where(is_desirable, 1 - sigmoid(z), 1.5 * (1 - sigmoid(-z)))
    np.testing.assert_allclose(loss.total, expected.sum(), rtol=1e-4)
    assert float(loss.weight) == NUM
    lengths = np.asarray(pairs.chosen_len)
    expected = {
        "rewards/chosen": 0.2 * gains[is_desirable].mean(),
        "rewards/rejected": 0.2 * gains[~is_desirable].mean(),
        "rewards/accuracies": ((gains > KL) == is_desirable).mean(),
        "logps/chosen": np.asarray(pairs.chosen)[is_desirable].mean(),
        "logps/rejected": np.asarray(pairs.chosen)[~is_desirable].mean(),
        "nll_loss": -np.asarray(pairs.chosen)[is_desirable].sum() / lengths[is_desirable].sum(),
    }  # fmt: skip
    means = {name: float(m.total / m.weight) for name, m in metrics.items()}
    assert means == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
    kl, _ = jax.jit(functools.partial(mismatch_kl, scorer_of(case)))(case["params"], batch)
    np.testing.assert_allclose(
        kl.total / kl.weight, np.mean(pairs.rejected - pairs.ref_rejected), rtol=1e-4
    )
