"""What is wrong with a record of preferences, said with its place; what is left out, counted."""

import dataclasses

import pytest

from alignjax.core.errors import UserError
from alignjax.data import Preference, Preferences
from alignjax.data.native import from_native

GOOD = {
    "prompt": "Say hello.", "responses": ["Hello!", "No.", "Hm"], "ranks": [1, 3, 2],
    "annotator": "ann", "time": "2026-11-25T01:02:03Z", "comment": "easy", "page": 7,
}  # fmt: skip


class Listed:
    def __init__(self, *records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def where(self, index):
        return f"ranked.jsonl:{index + 1}"


def changed(**changes):
    record = {**GOOD, **changes}
    return {key: value for key, value in record.items() if value != "absent"}


def judged(**judgement):
    return changed(ranks="absent", **judgement)


def test_a_record_by_its_parts():
    (found,) = Preferences(Listed(GOOD), from_native)
    assert found == Preference(
        "Say hello.", ["Hello!", "No.", "Hm"], ranks=[1, 3, 2], annotator="ann",
        time="2026-11-25T01:02:03Z", comment="easy", fields={"page": 7},
    )  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        changed(ranks=[1, 1, 1]),
        changed(ranks=[2, 2, 1], annotator=None, time="2026-11-25"),
        judged(choices=[[0, 1], [2, 1]]),
        judged(labels=[True, None, False]),
        judged(labels=[True], responses=["x"]),
        judged(scores=[4.5, None, -3]),
        changed(prompt=""),
        changed(prompt=[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]),
        changed(labels=None),
    ],
)
def test_what_is_right(record):
    assert len(Preferences(Listed(record), from_native)) == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            changed(responses=["Hello!"], ranks=[1]),
            "responses: 1 of them; expected at least 2: one alone is better than none other. Add "
            "another, or judge it by labels",
        ),
        (judged(responses=["a"], scores=[1.0]), "responses: 1 of them; expected at least 2"),
        (judged(responses=[], labels=[]), "responses: 0 of them; expected at least 1"),
        (changed(ranks=[1, 2]), "ranks: 2 values for 3 responses; give one for each"),
        (changed(ranks=[1, 2, 0]), "ranks[2]: expected a whole number from 1, came int 0"),
        (changed(ranks=[1, 2, True]), "ranks[2]: expected a whole number from 1, came bool True"),
        (changed(ranks="1 2 3"), "ranks: expected a list, came str '1 2 3'"),
        (
            judged(choices=[[0, 1], [1, 3]]),
            "choices[1]: [1, 3] names a response that is not there; with 3 responses expected 0 to "
            "2",
        ),
        (judged(choices=[[-1, 0]]), "choices[0]: [-1, 0] names a response that is not there"),
        (judged(choices=[[1, 1]]), "choices[0]: [1, 1] compares a response with itself"),
        (judged(choices=[[1]]), "choices[0]: expected [better, worse], came list [1]"),
        (judged(choices=[]), "choices: expected a list of [better, worse], came list []"),
        (judged(labels=[True, 1, None]), "labels[1]: expected true, false or null, came int 1"),
        (judged(labels=[None] * 3), "labels: all are null, so nothing is judged"),
        (
            judged(scores=[1.0, float("nan"), 2.0]),
            "scores[1]: expected a finite number, or null where nobody judged, came float nan",
        ),
        (judged(scores=[1.0, float("inf"), 2.0]), "scores[1]: expected a finite number"),
        (judged(scores=[1.0, "2", 2.0]), "scores[1]: expected a finite number"),
        (judged(scores=[None] * 3), "scores: all are null"),
        (
            changed(responses=["a", "b", "a"]),
            "responses[0] and responses[2] are equal, so neither is better; take one out",
        ),
        (changed(responses=["a", " \n", "b"]), "responses[1]: empty"),
        (changed(responses=["a", 3, "b"]), "responses[1]: expected text, came int 3"),
        (changed(responses="a"), "responses: expected a list of texts, came str 'a'"),
        (
            judged(),
            "expected exactly one judgement of ranks, choices, labels, scores, came none",
        ),
        (changed(scores=[1, 2, 3]), "came ranks and scores"),
        (changed(prompt=3), "prompt: expected text or a list of messages, came int 3"),
        (changed(prompt=[{"role": "bot", "content": "x"}]), "prompt[0].role: expected one of"),
        (changed(prompt="absent"), "no prompt (fields there: responses"),
        (changed(time="yesterday"), "time: expected ISO 8601"),
        (changed(annotator=7), "annotator: expected text, came int 7"),
    ],
)
def test_what_is_wrong(record, message):
    with pytest.raises(UserError) as error:
        Preferences(Listed(GOOD, record), from_native)
    assert str(error.value).startswith("ranked.jsonl:2: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_annotator_that_is_not_listed():
    Preferences(Listed(GOOD), from_native, annotators=["ann"])
    with pytest.raises(UserError, match=r"jsonl:2: annotator: 'bob' is none of 'ann', 'eve'; add"):
        Preferences(Listed(GOOD, changed(annotator="bob")), from_native, annotators=["ann", "eve"])
    with pytest.raises(UserError, match="annotator: None is none of 'ann'"):
        Preferences(Listed(changed(annotator="absent")), from_native, annotators=["ann"])


def test_faulty_records_can_be_left_out_and_are_counted():
    bad = changed(responses=["a", "a", "b"])
    found = Preferences(Listed(bad, GOOD, bad, changed(page=8)), from_native, faulty="drop")
    assert [one.fields["page"] for one in found] == [7, 8] and found.num_faulty == 2
    assert found.where(1) == "ranked.jsonl:4"
    with pytest.raises(UserError, match=r"one of 2 records is faulty.*ranked\.jsonl:1: responses"):
        Preferences(Listed(bad, bad), from_native, faulty="drop")


def test_nothing_changes_a_preference():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preferences(Listed(GOOD), from_native)[0].prompt = "x"
