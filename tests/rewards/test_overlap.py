"""Scoring while sampling: the same samples and scores in the same order, and nothing waits."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from alignjax.core.types import LENGTH, STOP, Completions, Sampling, Score
from alignjax.rewards.overlap import overlapped_rollout
from alignjax.rewards.rollout import Task, rollout

TOKENS = np.array(
    [[5, 9, 0, 0], [5, 5, 5, 5], [9, 0, 0, 0], [6, 5, 9, 0], [5, 6, 5, 9], [7, 9, 0, 0]], np.int32
)
LENGTHS = np.array([2, 4, 1, 3, 4, 2], np.int32)
SAMPLING = Sampling(max_tokens=4, stop_tokens=(9,), num_samples=2)
TASKS = [Task(np.arange(1, n + 1, dtype=np.int32), reference=n) for n in (1, 2, 3)]


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def generate(params, prompts, lengths, key, sampling, *, on_tokens=None):
    """One token of each row between two looks, later rows first."""
    assert prompts.shape == (3, 5) and lengths.tolist() == [1, 2, 3]
    for step in range(4):
        new = {
            row: TOKENS[row, step : step + 1]
            for row in reversed(range(6)) if step < LENGTHS[row]
        }  # fmt: skip
        if on_tokens is not None:
            on_tokens(SimpleNamespace(tokens=new))
    stopped = TOKENS[np.arange(6), LENGTHS - 1] == 9
    reasons = np.where(stopped, STOP, LENGTH).astype(np.int8)
    return Completions(TOKENS, LENGTHS, np.zeros((6, 4), np.float32), reasons)


def score(samples):
    return [Score(s.reference + s.num_tokens / 10 + 100 * s.is_truncated) for s in samples]


def run(function, score=score, generate=generate, sampling=SAMPLING):
    return function(generate, score, Words(), None, TASKS, None, sampling, prompt_len=5)


def test_samples_and_scores_are_the_same_in_the_same_order():
    plain, early = run(rollout), run(overlapped_rollout)
    assert early.scores == plain.scores and len(set(map(str, plain.scores))) == 6
    for a, b in zip(early.samples, plain.samples, strict=True):
        assert (a.prompt, a.completion, a.reference, a.num_tokens, a.is_truncated) == (
            b.prompt, b.completion, b.reference, b.num_tokens, b.is_truncated,
        )  # fmt: skip
        np.testing.assert_array_equal(a.completion_ids, b.completion_ids)
    assert [s.is_truncated for s in early.samples] == [False, True, False, False, False, False]


def test_scoring_goes_on_beside_sampling():
    """The sampler waits in its third step until the first completion is being scored, and the
    reward until the sampler has gone on: they would wait for ever one after the other."""
    is_scoring, has_gone_on, calls = threading.Event(), threading.Event(), []

    def waiting(samples):
        calls.append(len(samples))
        is_scoring.set()
        assert has_gone_on.wait(30)
        return score(samples)

    def stepping(*args, on_tokens):
        steps = []

        def look(seen):
            on_tokens(seen)
            steps.append(seen)
            if len(steps) == 3:
                assert is_scoring.wait(30)
                has_gone_on.set()

        return generate(*args, on_tokens=look)

    assert run(overlapped_rollout, waiting, stepping).scores == run(rollout).scores
    assert calls[0] == 1 and sum(calls) == 6 and len(calls) > 1


def test_what_a_reward_raises_ends_the_call():
    def broken(samples):
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        run(overlapped_rollout, broken)


def test_stop_sequences_are_refused():
    sampling = Sampling(max_tokens=4, num_samples=2, stop_sequences=((5, 6),))
    with pytest.raises(ValueError, match="stop_sequences"):
        run(overlapped_rollout, sampling=sampling)
