"""Verdicts by hand: orders, expectations, clamping, what is understood and what is not."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.rewards.judge import Item, Judge, Pair, PlaceBias, Verdict, place_bias
from alignjax.rewards.judge_answer import Answer, Question, probabilities, spoken
from alignjax.rewards.judge_config import HttpConfig, JudgeConfig, JudgingConfig
from alignjax.rewards.judge_prompt import load_templates


def asks(opinion, asked=None):
    """A judge that answers `opinion(fields)`: a probability, a text or None for an error."""

    def ask(questions):
        for place, question in enumerate(questions):
            if asked is not None:
                asked.append(question)
            said = opinion(question)
            if said is None:
                yield {place: Answer(error="broken")}
            elif isinstance(said, str):
                yield {place: Answer(said)}
            else:
                with np.errstate(divide="ignore"):
                    yield {place: Answer("", tuple(np.log(said).tolist()))}

    return ask


def judge(opinion, asked=None, **config):
    config = JudgingConfig(**config)
    return Judge(asks(opinion, asked), config, load_templates(config, []))


def of(p):
    return [p, 1 - p]


def longer(question):
    """Prefers length, and the first place by far."""
    by_length = len(question.fields["first"]) - len(question.fields["second"])
    return of(1 / (1 + math.exp(-(by_length + 3.0))))


def test_both_orders_are_averaged():
    opinions = {("x", "y"): 0.8, ("y", "x"): 0.6}
    asked = []
    found = judge(lambda q: of(opinions[q.fields["first"], q.fields["second"]]), asked).pairwise(
        [Pair("p", "x", "y")]
    )
    assert found[0].value == pytest.approx((0.8 + (1 - 0.6)) / 2)
    assert found[0].places == pytest.approx((0.8, 0.6))
    assert [(q.fields["first"], q.fields["second"]) for q in asked] == [("x", "y"), ("y", "x")]
    assert all(q.options == ("A", "B") for q in asked)


def test_a_judge_that_sees_places_alone_is_cancelled_exactly():
    for p in (0.9, 0.1, 1.0, 1 / 3):
        (verdict,) = judge(lambda q, p=p: of(p)).pairwise([Pair("p", "x", "y")])
        assert verdict.value == 0.5
    (one,) = judge(lambda q: of(0.9), both_orders=False).pairwise([Pair("p", "x", "y")])
    assert one.value == pytest.approx(0.9) and one.places == pytest.approx((0.9,))


def test_a_bias_is_cancelled_for_any_pair():
    """In logits length counts against a bias of 3: in both orders the longer one wins."""
    pairs = [Pair("p", "a" * m, "a" * n) for m in range(1, 6) for n in range(1, 6) if m != n]
    is_longer = [len(pair.first) > len(pair.second) for pair in pairs]
    both = judge(longer).pairwise(pairs)
    assert [verdict.value > 0.5 for verdict in both] == is_longer
    one = judge(longer, both_orders=False).pairwise(pairs)
    assert sum(verdict.value > 0.5 for verdict in one) > 1.5 * sum(is_longer)
    bias = place_bias(both)
    assert bias.first_is_better > 0.7 and bias.orders_agree < 0.5 and bias.num_pairs == len(pairs)


def test_place_bias_by_hand():
    verdicts = [
        Verdict(0.7, (0.9, 0.5)), Verdict(0.5, (0.8, 0.8)), Verdict(0.8, (0.9, 0.3)),
        Verdict(0.5, (0.5, 0.5)), Verdict(None), Verdict(0.4, (0.4,)),
    ]  # fmt: skip
    bias = place_bias(verdicts)
    assert bias.first_is_better == pytest.approx((0.9 + 0.5 + 0.8 + 0.8 + 0.9 + 0.3 + 1.0) / 8)
    # Of the first pair one order has no opinion; of the second both are for the first place.
    assert bias.orders_agree == pytest.approx(2 / 4) and bias.num_pairs == 4
    assert place_bias([Verdict(0.4, (0.4,))]) == PlaceBias(None, None, 0)


@pytest.mark.parametrize(
    ("p", "config", "label"),
    [
        (0.97, {"think": {}}, 0.6), (0.02, {"think": {}}, 0.4), (0.55, {"think": {}}, 0.55),
        (0.97, {"think": {}, "clamp": None}, 0.97), (0.97, {}, 0.97),
        (0.97, {"clamp": (0.1, 0.8)}, 0.8),
        (0.59, {"harden": 0.1}, 0.5), (0.41, {"harden": 0.1}, 0.5), (0.61, {"harden": 0.1}, 1.0),
        (0.39, {"harden": 0.1}, 0.0), (0.75, {"harden": 0.25}, 1.0),
        (0.97, {"think": {}, "harden": 0.1}, 1.0),
    ],
)  # fmt: skip
def test_labels_are_clamped_or_hardened(p, config, label):
    def said(question):
        return of(p) if question.fields["first"] == "x" else of(1 - p)

    (verdict,) = judge(said, **config).pairwise([Pair("p", "x", "y")])
    assert verdict.value == pytest.approx(label)
    assert verdict.places == pytest.approx((p, 1 - p)), "as they were said"


def test_scores_are_expectations():
    chances = {"low": [0.5, 0.5, *[0] * 8], "high": [0] * 9 + [1], "wide": [0.1] * 10}
    asked = []
    found = judge(lambda q: chances[q.fields["response"]], asked).pointwise(
        [Item("p", name) for name in chances]
    )
    assert [v.value for v in found] == pytest.approx([1.5, 10, 5.5])
    assert asked[0].options == (*"123456789", "10")
    # Of what is not normalised, such as a list of the likeliest tokens, the ratio counts.
    (verdict,) = judge(lambda q: [0.1, 0, 0.3], best_score=3).pointwise([Item("p", "r")])
    assert verdict.value == pytest.approx(1 * 0.25 + 3 * 0.75)


def test_what_is_not_understood_is_asked_again_and_then_left_out():
    said, asked = iter(["I like A", "", "B"]), []
    (verdict,) = judge(
        lambda q: next(said) if q.fields["first"] == "x" else "A", asked, num_attempts=3
    ).pairwise([Pair("p", "x", "y")])
    assert verdict == Verdict(0.0, (0.0, 1.0), 2, None, False, ("B", "A"))
    assert [(q.fields["first"], q.attempt) for q in asked] == [
        ("x", 0), ("y", 0), ("x", 1), ("x", 2),
    ]  # fmt: skip
    (verdict, other) = judge(
        lambda q: "perhaps" if q.fields["second"] == "x" else "A", num_attempts=2
    ).pairwise([Pair("p", "x", "y"), Pair("p", "v", "w")])
    assert verdict.value is None and verdict.num_unparsable == 2 and not verdict.is_failed
    assert verdict.error == "not understood 2 times: 'perhaps'"
    assert other.value == 0.5 and other.error is None


def test_an_error_is_no_verdict():
    (verdict,) = judge(lambda q: None if q.fields["first"] == "y" else of(0.9)).pairwise(
        [Pair("p", "x", "y")]
    )
    assert (verdict.value, verdict.error, verdict.is_failed) == (None, "broken", True)
    (verdict,) = judge(lambda q: None).pointwise([Item("p", "r")])
    assert (verdict.value, verdict.error, verdict.is_failed) == (None, "broken", True)
    assert judge(lambda q: None).pairwise([]) == judge(lambda q: None).pointwise([]) == []


PLAIN = Question("", ("A", "B"))
COT = Question("", ("A", "B"), cue="Verdict:")
SCORE = Question("", ("1", "2", "10"))


@pytest.mark.parametrize(
    ("text", "question", "place"),
    [
        ("A", PLAIN, 0), (" b", PLAIN, None), ("**B**.\n", PLAIN, 1), ("(A)", PLAIN, 0),
        ("A better response", PLAIN, None), ("Response A", PLAIN, None), ("A or B", PLAIN, None),
        ("", PLAIN, None), ("AB", PLAIN, None),
        ("A is good.\nVerdict: B", COT, 1), ("Verdict: A\nNo.\nVerdict: B", COT, 1),
        ("A", COT, None),
        ("Verdict: A\nand that is it", COT, 0), ("Verdict: A or B", COT, None),
        ("Verdict:", COT, None), ("Verdict: **A**", COT, 0),
        ("10", SCORE, 2), ("1", SCORE, 0), ("3", SCORE, None), ("2/10", SCORE, None),
        ("2.", SCORE, 1), ("1 0", SCORE, None),
    ],
)  # fmt: skip
def test_what_is_understood(text, question, place):
    assert spoken(text, question) == place
    found = probabilities(question, Answer(text))
    assert (found is None) == (place is None)
    assert found is None or found.tolist() == np.eye(len(question.options))[place].tolist()


def test_log_probs_count_before_the_text():
    assert probabilities(PLAIN, Answer("B", (-0.1, -math.inf))).tolist() == [1, 0]
    assert probabilities(PLAIN, Answer("B", (-math.inf, -math.inf))) is None
    assert probabilities(PLAIN, Answer("", (-800.0, -800.0 - math.log(3)))).tolist() == (
        pytest.approx([0.75, 0.25])
    )


HTTP = {"url": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give one of http"),
        ({"http": HTTP, "function": "a.b"}, "http and func"),
        ({"http": HTTP, "clamp": (0.6, 0.9)}, "around 0.5"),
        ({"http": HTTP, "clamp": (0.4, 0.6), "harden": 0.1}, "harden would undo clamp"),
        ({"http": HTTP, "options": ("A", "A ")}, "two unlike texts"),
        ({"http": {**HTTP, "url": "localhost:1"}}, "expected http://HOST"),
        ({"http": {**HTTP, "url": "http://me:secret@host/v1"}}, "use key_env"),
        ({"http": {**HTTP, "max_spend": 1.0}}, "max_spend needs prices"),
        ({"function": "a.b", "think": {}}, "no template or think"),
        ({"http": HTTP, "name": "a b"}, "pattern"),
    ],
)  # fmt: skip
def test_bad_configs(config, message):
    with pytest.raises(ValidationError, match=message):
        JudgeConfig(**config)
    assert HttpConfig(url="https://host/v1/", model="m").url == "https://host/v1"
