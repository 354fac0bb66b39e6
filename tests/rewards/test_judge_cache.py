"""Answers are found again by all that they depend on, and by nothing less."""

import dataclasses
import math
import sqlite3
import threading

import pytest

from alignjax.core.errors import UserError
from alignjax.rewards.judge_answer import Answer, Question, Usage
from alignjax.rewards.judge_cache import AnswerCache, CachedAsk, digest

QUESTION = Question("text", ("A", "B"), {"f": 1}, "cue", "template", 0)


def test_what_an_answer_depends_on():
    changes = {
        "text": "other", "options": ("A", "C"), "cue": None, "template": "other", "attempt": 1,
    }  # fmt: skip
    others = [dataclasses.replace(QUESTION, **{name: value}) for name, value in changes.items()]
    found = {digest(one, "judge") for one in (QUESTION, *others)} | {digest(QUESTION, "other")}
    assert len(found) == 7
    # The fields are in the text already.
    assert digest(dataclasses.replace(QUESTION, fields={}), "judge") == digest(QUESTION, "judge")


ANSWERS = {
    "a": Answer("ä\ud800 \x00", (-0.25, -math.inf), Usage(2, 30, 4)),
    "b": Answer("", None, Usage(1)),
}


def test_answers_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "c.sqlite"
    cache = AnswerCache(path)
    assert cache.find(["a", "b"]) == {} and cache.spent("x") == Usage()
    cache.add("x", ANSWERS, Usage(3, 30, 4))
    cache.add("x", {"a": Answer("too late")}, Usage(1, 1, 1))
    cache.add("y", {}, Usage(5))
    cache.close()
    again = AnswerCache(path)
    assert again.find(["b", "a", "c"]) == ANSWERS
    assert again.find([str(i) for i in range(3000)] + ["a"]) == {"a": ANSWERS["a"]}
    assert again.spent("x") == Usage(4, 31, 5) and again.spent("y") == Usage(5)
    again.close()


def test_files_that_are_none_of_ours(tmp_path):
    (tmp_path / "text").write_text("no database at all, " * 100)
    with pytest.raises(UserError, match=r"judge.cache .*text: cannot be used: file is not a data"):
        AnswerCache(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(UserError, match="but no cache of judgements"):
        AnswerCache(tmp_path / "other")
    with pytest.raises(UserError, match="cannot be used"):
        AnswerCache(tmp_path / "text" / "below")


def questions(texts):
    return [dataclasses.replace(QUESTION, text=text) for text in texts]


class Backend:
    """Answers one by one, the last first; raises at `breaks_at`; errors on what says "error"."""

    def __init__(self, breaks_at=None):
        self.asked, self.breaks_at = [], breaks_at

    def __call__(self, questions):
        for place in reversed(range(len(questions))):
            text = questions[place].text
            self.asked.append(text)
            if text == self.breaks_at:
                raise KeyboardInterrupt
            error = "broken" if "error" in text else None
            yield {place: Answer(f"says {text}", usage=Usage(1, 2, 3), error=error)}


def asked(cache, backend, texts, identity="i"):
    cached = CachedAsk(backend, cache, identity=identity, account="x")
    found = {}
    for chunk in cached(questions(texts)):
        assert not found.keys() & chunk.keys()
        found |= chunk
    assert sorted(found) == list(range(len(texts)))
    return [found[i].text for i in range(len(texts))], cached


def test_each_question_is_asked_once(tmp_path):
    cache, backend = AnswerCache(tmp_path / "c"), Backend()
    texts = ["a", "b", "a", "error", "c"]
    found, cached = asked(cache, backend, texts)
    assert found == [f"says {text}" for text in texts]
    assert backend.asked == ["c", "error", "b", "a"] and cached.num_asked == 4
    found, cached = asked(cache, backend, [*texts, "d"])
    assert found == [f"says {text}" for text in [*texts, "d"]]
    assert backend.asked[4:] == ["d", "error"], "an error is no answer"
    assert (cached.num_found, cached.num_asked) == (3, 2)
    assert cache.spent("x") == Usage(6, 12, 18)
    asked(cache, backend, ["a"], identity="another model")
    assert backend.asked[6:] == ["a"]
    assert asked(cache, backend, [])[0] == []
    cache.close()


def test_what_was_answered_before_an_interrupt_is_kept(tmp_path):
    cache = AnswerCache(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        asked(cache, Backend("b"), ["a", "b", "c", "d"])
    cache.close()
    cache, backend = AnswerCache(tmp_path / "c"), Backend()
    asked(cache, backend, ["a", "b", "c", "d"])
    assert backend.asked == ["b", "a"]
    cache.close()


def test_threads_share_a_cache(tmp_path):
    cache, wrong = AnswerCache(tmp_path / "c"), []

    def work(n):
        for i in range(30):
            key = f"{(i + n) % 30}"
            cache.add("x", {key: Answer(key)}, Usage(1))
            if cache.find([key]) != {key: Answer(key)}:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.spent("x") == Usage(180)
    cache.close()
