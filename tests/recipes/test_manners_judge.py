"""Judges of the world of manners, by hand: their opinion, their bias, how often they are wrong."""

import pytest

from alignjax.recipes import manners
from alignjax.recipes.manners_judge import compare, rate

PROMPT = "ann asks about tea and rain:"
GOOD = " hello ann, tea is warm and rain is wet"
BAD = " oaf ann, tea is cold and rain is wet"


def test_by_hand():
    assert compare(PROMPT, GOOD, BAD) == pytest.approx(0.95)
    assert compare(PROMPT, BAD, GOOD) == pytest.approx(0.35)
    assert compare(PROMPT, GOOD, GOOD + " ") == pytest.approx(0.65)
    # 3 points, 0.5 points, none at all.
    assert rate(PROMPT, GOOD) == 10.0
    assert rate(PROMPT, BAD) == pytest.approx(1 + 9 * 3.5 / 6)
    assert rate(PROMPT, "") == pytest.approx(5.5)


def test_noise_is_of_pairs_and_not_of_orders():
    draw = manners.Draw("noise")
    pairs = [(q.prompt, draw.response(q), draw.response(q)) for q in manners.QUESTIONS]
    wrong = num = 0
    for prompt, first, second in pairs:
        true = compare(prompt, first, second)
        said, other = compare(prompt, first, second, noise=0.1), compare(
            prompt, second, first, noise=0.1
        )  # fmt: skip
        assert (said - 0.65) == pytest.approx(0.65 - other), "of one opinion in both orders"
        if abs(true - 0.65) > 0.01:
            num += 1
            wrong += (said > 0.65) != (true > 0.65)
    assert num > 500 and wrong / num == pytest.approx(0.1, abs=0.03)
    odd = sum(rate(p, a) != rate(p, a, noise=0.1) for p, a, _ in pairs)
    assert odd / len(pairs) == pytest.approx(0.1, abs=0.03)
