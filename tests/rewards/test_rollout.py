"""Prompts to scored completions, with a generator and a scorer that are plain functions."""

import datetime
import decimal
import json
from types import SimpleNamespace

import numpy as np
import pytest

from alignjax.core.types import LENGTH, STOP, Completions, Sample, Sampling, Score
from alignjax.rewards.rollout import Task, rollout

LETTERS = SimpleNamespace(decode=lambda ids: "".join("_abcdefgh$"[i] for i in ids if i != 9))
"""A tokenizer: 1 is a, 2 is b, ...; 9 ends a completion and is special."""


@pytest.fixture
def seen():
    return {}


@pytest.fixture
def generate(seen):
    """Answers prompt i with i + 1 tokens of its own first token; sample 1 is cut, 0 ends with 9."""

    def fake(params, prompts, lengths, key, sampling):
        seen.update(
            params=params, prompts=prompts.copy(), lengths=lengths, key=key, sampling=sampling
        )
        rows = [(i, g) for i in range(len(prompts)) for g in range(sampling.num_samples)]
        tokens = np.full((len(rows), 4), 7, np.int32)  # what is beyond a length is never looked at
        counts, reasons = [], []
        for row, (i, g) in zip(tokens, rows, strict=True):
            row[: i + 1] = prompts[i, 0] + g
            if g == 0:
                row[i + 1] = 9
            counts.append(i + 1 + (g == 0))
            reasons.append(LENGTH if g == 1 else STOP)
        logps = np.zeros(tokens.shape, np.float32)
        return Completions(tokens, np.array(counts, np.int32), logps, np.array(reasons, np.int8))

    return fake


TASKS = [
    Task(np.array([3, 1], np.int32), reference="r0", fields={"level": 5}),
    Task(np.array([5], np.int32), reference=["r1"]),
]


def test_each_sample_is_given_its_own_prompt_reference_and_fields(generate, seen):
    given = []

    def score(samples):
        given.extend(samples)
        return [Score(float(s.num_tokens)) for s in samples]

    sampling = Sampling(num_samples=2, max_tokens=4)
    out = rollout(generate, score, LETTERS, "params", TASKS, "key", sampling, prompt_len=3)
    assert (seen["params"], seen["key"], seen["sampling"]) == ("params", "key", sampling)
    # Right-padded to the width that was asked for, whatever the prompts are.
    assert seen["prompts"].tolist() == [[3, 1, 0], [5, 0, 0]]
    assert seen["prompts"].dtype == seen["lengths"].dtype == np.int32
    assert seen["lengths"].tolist() == [2, 1]
    assert (
        given
        == out.samples
        == [
            Sample("ca", "c", "r0", {"level": 5}, num_tokens=2, is_truncated=False),
            Sample("ca", "d", "r0", {"level": 5}, num_tokens=1, is_truncated=True),
            Sample("e", "ee", ["r1"], {}, num_tokens=3, is_truncated=False),
            Sample("e", "ff", ["r1"], {}, num_tokens=2, is_truncated=True),
        ]
    )
    assert out.rewards.tolist() == [[2, 1], [3, 2]] and out.rewards.dtype == np.float32
    assert out.is_truncated.tolist() == [False, True, False, True]
    assert out.num_tokens == (2 + 2 + 1 + 1) + (2 + 1 + 3 + 2)
    assert out.part_names == []


SCORES = [
    Score(1.0, {"right": 1.0, "shape": 0.5}),
    Score(None, error="reward 'right' hangs"),
    Score(0.25, {"shape": 0.25}),
    Score(None, {"right": 1.0, "rare": 2.0}, error="the sum is inf"),
]


@pytest.fixture
def out(generate):
    sampling = Sampling(num_samples=2, max_tokens=4)
    return rollout(
        generate, lambda samples: SCORES, LETTERS, None, TASKS, None, sampling, prompt_len=2
    )


def test_what_failed_is_nan_and_never_a_zero(out):
    np.testing.assert_array_equal(out.rewards, [[1, np.nan], [0.25, np.nan]])


def test_parts_that_some_samples_lack(out):
    assert out.part_names == ["right", "shape", "rare"]
    np.testing.assert_array_equal(out.part("right"), [[1, np.nan], [np.nan, 1]])
    np.testing.assert_array_equal(out.part("shape"), [[0.5, np.nan], [0.25, np.nan]])
    assert np.isnan(out.part("nowhere")).all() and out.part("nowhere").shape == (2, 2)


def test_records_say_all_of_a_sample(out):
    assert out.records([3, 0]) == [
        {
            "prompt": "e",
            "completion": "ff",
            "reference": ["r1"],
            "reward": None,
            "parts": {"right": 1.0, "rare": 2.0},
            "num_tokens": 2,
            "is_truncated": True,
            "error": "the sum is inf",
        },
        {
            "prompt": "ca",
            "completion": "c",
            "reference": "r0",
            "reward": 1.0,
            "parts": {"right": 1.0, "shape": 0.5},
            "num_tokens": 2,
            "is_truncated": False,
            "error": None,
        },
    ]


@pytest.mark.parametrize(
    ("reference", "shown"),
    [
        (decimal.Decimal("1.50"), "1.50"),
        (
            {"when": datetime.date(2026, 11, 24), "n": np.arange(2)},
            {"when": "2026-11-24", "n": [0, 1]},
        ),
        (b"\xff", None),
        (1j, "1j"),
    ],
)
def test_any_reference_can_be_written_down(generate, reference, shown):
    tasks = [Task(task.tokens, reference) for task in TASKS]
    sampling = Sampling(num_samples=2, max_tokens=4)
    out = rollout(
        generate, lambda samples: SCORES, LETTERS, None, tasks, None, sampling, prompt_len=2
    )
    (record,) = out.records([0])
    assert json.loads(json.dumps(record))["reference"] == shown


def test_a_prompt_wider_than_prompt_len_is_refused(generate):
    with pytest.raises(ValueError, match="could not broadcast"):
        rollout(generate, len, LETTERS, None, TASKS, None, Sampling(), prompt_len=1)
