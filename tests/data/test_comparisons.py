"""Each view of each kind of judgement, by hand."""

from dataclasses import replace

import pytest

from alignjax.core.errors import UserError
from alignjax.data import Comparison, Preference, pairs, rankings, unpaired

A, B, C, D = "abcd"


class Listed(list):
    def where(self, index):
        return f"ranked.jsonl:{index + 1}"


RANKED = Preference("p", [A, B, C, D], ranks=[2, 1, 2, 4])
CHOSEN = Preference("q", [A, B, C], choices=[[0, 1], [2, 1]])
LABELLED = Preference("r", [A, B, C], labels=[False, None, True])
SCORED = Preference("s", [A, B, C, D], scores=[0.5, None, 3.0, 0.5], fields={"gap": 2})
TIED = Preference("t", [A, B], ranks=[1, 1])
ALL = Listed([RANKED, CHOSEN, TIED, LABELLED, SCORED])


def of(view):
    return [view[i] for i in range(len(view))]


def test_rankings():
    view = rankings(ALL)
    assert of(view) == [
        Comparison("p", [A, B, C, D], (2, 1, 2, 3)),
        Comparison("q", [A, B], (1, 2)),
        Comparison("q", [C, B], (1, 2)),
        Comparison("r", [A, C], (2, 1)),
        Comparison("s", [A, C, D], (2, 1, 2)),
    ]
    assert view.num_responses == 4 and view.num_left_out == 1
    assert [view.where(i) for i in (0, 2, 3)] == [f"ranked.jsonl:{n}" for n in (1, 2, 4)]


def pair(prompt, better, worse, margin=0.0):
    return Comparison(prompt, [better, worse], (1, 2), margin)


def test_all_pairs_of_unlike_rank():
    view = pairs(ALL)
    assert of(view) == [
        pair("p", A, D), pair("p", B, A), pair("p", B, C), pair("p", B, D), pair("p", C, D),
        pair("q", A, B), pair("q", C, B), pair("r", C, A), pair("s", C, A), pair("s", C, D),
    ]  # fmt: skip
    assert view.num_responses == 2


def test_the_best_against_the_worst():
    """Of several best the first, of several worst the last."""
    several = Preference("u", [A, B, C, D], ranks=[2, 1, 1, 2])
    assert of(pairs(Listed([RANKED, CHOSEN, TIED, SCORED, several]), "best_worst")) == [
        pair("p", B, D), pair("q", A, B), pair("q", C, B), pair("s", C, D), pair("u", B, D),
    ]  # fmt: skip


def test_margins():
    scored = Listed([SCORED])
    assert of(pairs(scored, margin="scores")) == [pair("s", C, A, 2.5), pair("s", C, D, 2.5)]
    assert of(pairs(scored, "best_worst", margin="gap", margin_scale=0.5)) == [pair("s", C, D, 1)]
    with pytest.raises(UserError, match=r"ranked\.jsonl:1: margin: expected a number in field 'x'"):
        pairs(scored, margin="x")
    with pytest.raises(UserError, match=r'ranked\.jsonl:2: margin: "scores" needs records that'):
        pairs(Listed([SCORED, RANKED]), margin="scores")


def test_probabilities_and_ties():
    sure = [replace(p, fields={"sure": sure}) for p, sure in ((RANKED, 0.75), (TIED, 0.5))]
    probs = [pair("p", *x, 0.75) for x in ((A, D), (B, A), (B, C), (B, D), (C, D))]
    assert of(pairs(Listed(sure), prob="sure")) == probs
    view = pairs(Listed(sure), prob="sure", ties=True)
    ties = [Comparison("p", [A, C], (1, 1), 0.5), Comparison("t", [A, B], (1, 1), 0.5)]
    assert of(view) == [*probs, *ties] and view.num_left_out == 0
    with pytest.raises(UserError, match=r"ranked\.jsonl:1: probability: expected a number in"):
        pairs(Listed([RANKED]), prob="sure")
    wrong = replace(RANKED, fields={"sure": 1.5})
    with pytest.raises(UserError, match=r"ranked\.jsonl:2: sure: expected a probability.*came 1.5"):
        pairs(Listed([TIED, wrong]), prob="sure")


def one(prompt, response, label):
    return Comparison(prompt, [response], (1,), label=label)


def test_single_responses_with_labels():
    view = unpaired(ALL)
    assert of(view) == [
        one("p", B, True), one("p", D, False),
        one("q", A, True), one("q", B, False), one("q", C, True),
        one("r", A, False), one("r", C, True),
        one("s", A, False), one("s", C, True), one("s", D, False),
    ]  # fmt: skip
    assert view.num_responses == 1 and view.num_left_out == 1


@pytest.mark.parametrize("view", [rankings, pairs, unpaired])
def test_where_nothing_is_said(view):
    with pytest.raises(UserError, match=r"ranked\.jsonl:1 and the 1 others: none says of"):
        view(Listed([TIED, TIED]))
