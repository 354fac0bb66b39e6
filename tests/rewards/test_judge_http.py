"""An endpoint that delays, fails, limits, talks nonsense, breaks off and dies: nothing is lost,
nothing is asked twice, nothing hangs, and nobody sees the key."""

import gc
import json
import logging
import math
import threading
import time
import traceback

import pytest

from alignjax.core.errors import UserError
from alignjax.rewards.judge import Judge, Pair
from alignjax.rewards.judge_answer import Question, Usage
from alignjax.rewards.judge_cache import AnswerCache, CachedAsk
from alignjax.rewards.judge_completion import ReplyError, read_reply
from alignjax.rewards.judge_config import HttpConfig, JudgingConfig, ThinkConfig
from alignjax.rewards.judge_http import HttpAsk, money
from alignjax.rewards.judge_prompt import load_templates
from tests.rewards.judge_server import (
    Server,
    breaks_off,
    fails,
    hangs_up,
    says,
    trickles,
    waits,
)

KEY = "sk-very-secret-0123456789"
QUICK = {"backoff_s": 0.001, "timeout_s": 5.0}


def config(server, **changes):
    return HttpConfig(**{"url": server.url, "model": "m", **QUICK, **changes})


def questions(num):
    return [Question(f"q{i}", ("A", "B"), template="t") for i in range(num)]


def ask(server, asked, **changes):
    """Answers by place."""
    found = {}
    for chunk in HttpAsk(config(server, **changes))(asked):
        found |= chunk
    return [found[i] for i in range(len(asked))]


def test_what_is_asked_and_answered():
    top = [{"A": -0.2, " A": -3.0, "B": -2.0, "C": -4.0}]
    with Server(lambda count, body: says("A", top)) as server:
        (answer,) = ask(server, questions(1), system="be fair", extra={"seed": 7, "max_tokens": 3})
    assert server.asked == [{
        "model": "m", "temperature": 0.0, "max_tokens": 3, "logprobs": True, "top_logprobs": 20,
        "seed": 7,
        "messages": [{"role": "system", "content": "be fair"}, {"role": "user", "content": "q0"}],
    }]  # fmt: skip
    assert server.keys == [None]
    # Tokens that are an option but for spaces count together.
    assert answer.logps == pytest.approx((math.log(math.exp(-0.2) + math.exp(-3.0)), -2.0))
    assert answer.text == "A" and answer.usage == Usage(1, 100, 10) and answer.error is None


def test_several_at_a_time_and_no_more():
    with Server(lambda count, body: waits(0.05, says("A"))) as server:
        start = time.monotonic()
        found = ask(server, questions(12), concurrency=4)
        took = time.monotonic() - start
    assert server.most_open == 4 and 0.14 < took < 0.5
    assert [a.text for a in found] == ["A"] * 12
    assert sorted(b["messages"][-1]["content"] for b in server.asked) == sorted(
        q.text for q in questions(12)
    )


FAULTS = {
    "500": fails(500), "503": fails(503), "429": fails(429, Retry_After="0"),
    "408": fails(408), "garbage": fails(200, "<html>"),
    "empty": fails(200, ""), "half": breaks_off, "gone": hangs_up,
    "no choices": fails(200, '{"choices": []}'), "list": fails(200, "[]"),
    "number": fails(200, '{"choices": [{"message": {"content": 5}}]}'),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_asked_again(name):
    with Server(lambda count, body: FAULTS[name] if count < 2 else says("B")) as server:
        (answer,) = ask(server, questions(1))
    assert answer.text == "B" and answer.usage.num_requests == len(server.asked) == 3


def test_a_fault_that_stays_is_an_error_and_the_others_are_answered():
    def plan(count, body):
        return fails(500, "out of order") if body["messages"][-1]["content"] == "q1" else says("A")

    with Server(plan) as server:
        found = ask(server, questions(3), num_retries=2)
    assert [a.text for a in found] == ["A", "", "A"] and found[1].usage.num_requests == 3
    assert found[1].error == (
        f"judge.http {server.url}: no answer in 3 requests, the last: HTTP 500: out of order"
    )
    with Server(lambda count, body: fails(400, "too long")) as server:
        (answer,) = ask(server, questions(1))
    assert answer.error.endswith("HTTP 400: too long") and len(server.asked) == 1, "not repeated"


@pytest.mark.parametrize("slow", [waits(30, says("A")), trickles], ids=["silent", "trickling"])
def test_a_slow_answer_ends_in_time(slow):
    with Server(lambda count, body: slow if count == 0 else says("B")) as server:
        start = time.monotonic()
        (answer,) = ask(server, questions(1), timeout_s=0.4)
        assert time.monotonic() - start < 2
    assert answer.text == "B" and answer.usage.num_requests == 2


def test_an_endpoint_that_is_gone():
    with Server(lambda count, body: says("A")) as server:
        pass
    (answer,) = ask(server, questions(1), num_retries=1)
    assert "ConnectError" in answer.error and answer.usage.num_requests == 2


def test_it_waits_as_long_as_it_is_told():
    def plan(count, body):
        return fails(429, Retry_After="1") if count == 0 else says("A")

    with Server(plan) as server:
        ask(server, questions(4), concurrency=1)
        first, *others = server.times
    assert min(others) - first > 0.95, "whoever is next waits, too"
    with Server(lambda count, body: fails(429, Retry_After="3600")) as server:
        start = time.monotonic()
        (answer,) = ask(server, questions(1), max_wait_s=10.0)
        assert time.monotonic() - start < 2
    assert "it asks to wait 3600 s, more than max_wait_s" in answer.error
    with Server(
        lambda count, body: fails(503, Retry_After="tomorrow") if not count else says("A")
    ) as s:
        assert ask(s, questions(1))[0].text == "A"


def test_a_rate_is_kept():
    with Server(lambda count, body: says("A")) as server:
        asking = HttpAsk(config(server, requests_per_minute=600, concurrency=8))
        for _ in range(2):  # From one call to the next, too.
            assert len([*asking(questions(4))]) == 4
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert server.times[-1] - server.times[0] > 0.65 and min(gaps) > 0.05


def test_a_budget_is_kept(tmp_path):
    with Server(lambda count, body: says("A")) as server:
        found = ask(server, questions(6), max_requests=4)
        assert len(server.asked) == 4 and sum(a.error is None for a in found) == 4
        refused = [a.error for a in found if a.error is not None]
        assert all(
            "max_requests=4 is used up (4); what was answered is in the" in e for e in refused
        )
        # One request costs 100 and 10 tokens.
        found = ask(server, questions(6), concurrency=1, max_tokens_total=300)
        assert sum(a.error is None for a in found) == 3
        found = ask(
            server, questions(6), concurrency=1, max_spend=0.002, prices=(10.0, 20.0)
        )  # fmt: skip
        assert sum(a.error is None for a in found) == 2
        assert "max_spend=0.002 is used up (0.0024)" in found[-1].error
        assert money(Usage(9, 1_000_000, 2_000_000), (3.0, 15.0)) == 33.0
        # What was spent before counts, whatever process it was.
        cache = AnswerCache(tmp_path / "c.sqlite")
        for num in (3, 0):
            asking = HttpAsk(config(server, max_requests=3, concurrency=1))
            asking.spent = cache.spent(asking.account)
            cached = CachedAsk(asking, cache, identity="i", account=asking.account)
            new = [q for q in questions(9) if num or q.text > "q4"]
            chunks = [chunk for chunk in cached(new)]
            assert sum(a.error is None for c in chunks for a in c.values()) == num
        cache.close()


def test_a_budget_of_tokens_needs_their_number():
    body = '{"choices": [{"message": {"content": "A"}}]}'
    with (
        Server(lambda count, _: fails(200, body)) as server,
        pytest.raises(UserError, match="do not say how many tokens"),
    ):
        ask(server, questions(1), max_tokens_total=10)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_repetition_mends_stops_at_once(status, monkeypatch):
    with Server(lambda count, body: fails(status, "see the manual")) as server:
        start = time.monotonic()
        with pytest.raises(UserError, match=f"HTTP {status}: see the manual; see url, model"):
            ask(server, questions(50), concurrency=2)
        assert len(server.asked) <= 4 and time.monotonic() - start < 2
    assert not [t for t in threading.enumerate() if t.name == "judge"]


def test_nobody_sees_the_key(monkeypatch, tmp_path, caplog, capfd):
    """The endpoint repeats it wherever it can."""
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    replies = [
        fails(500, f"bad key {KEY}", X_Key=KEY), fails(200, f"no JSON, {KEY}"),
        fails(400, f"the key {KEY} is too short"), says(f"Bearer {KEY}"), fails(401, KEY),
    ]  # fmt: skip
    with Server(lambda count, body: replies[min(count, 4)]) as server:
        cache = AnswerCache(tmp_path / "cache.sqlite")
        asking = HttpAsk(config(server, key_env="MY_KEY", num_retries=1, concurrency=1))
        cached = CachedAsk(asking, cache, identity=asking.identity, account=asking.account)
        found, shown = [], [asking.identity, asking.account, repr(asking)]
        try:
            for chunk in cached(questions(4)):
                found += chunk.values()
        except UserError as error:
            shown.append("".join(traceback.format_exception(error)))
        cache.close()
    assert server.keys == [f"Bearer {KEY}"] * 5
    assert "HTTP 401: ***" in shown[-1]
    assert [a.error is None for a in found] == [False, False, True]
    assert "no JSON, ***" in found[0].error and "the key *** is" in found[1].error
    assert found[2].text == "Bearer ***"
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    logged = [record.getMessage() for record in caplog.records]
    texts = [*shown, *logged, *(repr(a) for a in found), *capfd.readouterr()]
    assert KEY.encode() not in kept and all(KEY not in text for text in texts)
    assert len(kept) > 1000 and KEY not in json.dumps(config(server, key_env="MY_KEY").model_dump())


def test_a_key_that_is_missing_or_no_header(monkeypatch):
    with Server(lambda count, body: says("A")) as server:
        monkeypatch.delenv("MY_KEY", raising=False)
        with pytest.raises(UserError, match="no MY_KEY; set it"):
            HttpAsk(config(server, key_env="MY_KEY"))
        monkeypatch.setenv("MY_KEY", f"{KEY}\nX: y")
        with pytest.raises(UserError, match="characters that no key has") as caught:
            HttpAsk(config(server, key_env="MY_KEY"))
    assert KEY not in str(caught.value)


def test_who_goes_away_leaves_nothing_behind():
    with Server(lambda count, body: waits(0.2, says("A")) if count else says("A")) as server:
        start, answers = time.monotonic(), HttpAsk(config(server))(questions(40))
        next(answers)
        answers.close()  # As an interrupt does.
        del answers
        gc.collect()
        assert time.monotonic() - start < 6  # 40 answers of 0.2 s would take 8.
    assert not [t for t in threading.enumerate() if t.name == "judge"] and len(server.asked) < 20


def test_nothing_is_asked_twice_and_nothing_lost(tmp_path):
    """A judge of pairs with an endpoint that fails in every way; then the same once more."""
    faults = [f for name, f in FAULTS.items()]

    def plan(count, body):
        if count % 3 == 1:
            return faults[count // 3 % len(faults)]
        return says("A" if "[response A" in body["messages"][-1]["content"] else "B")

    judging = JudgingConfig()
    pairs = [Pair(f"p{i % 9}", f"x{i}", f"y{i}") for i in range(20)]
    pairs += pairs[:5]  # What stands twice is asked once.
    counts = []
    with Server(plan) as server:
        for _ in range(2):
            cache = AnswerCache(tmp_path / "c.sqlite")
            asking = HttpAsk(config(server))
            cached = CachedAsk(asking, cache, identity=asking.identity, account=asking.account)
            verdicts = Judge(cached, judging, load_templates(judging, [])).pairwise(pairs)
            assert [v.value for v in verdicts] == [0.5] * 25
            assert [v.error for v in verdicts] == [None] * 25
            counts.append((len(server.asked), cached.num_asked, cached.num_found))
            assert cache.spent(asking.account).num_requests == len(server.asked)
            cache.close()
    assert counts[0][1:] == (40, 0) and counts[1] == (counts[0][0], 0, 40)
    assert sorted(server.answered) == sorted(set(server.answered)) and len(server.answered) == 40


SCORE = Question("", (*"123456789", "10"))
COT = Question("", ("A", "B"), cue="Verdict:")


def reply(text, tokens, top):
    content = [
        {
            "token": t,
            "logprob": -9.0,
            "top_logprobs": [{"token": k, "logprob": v} for k, v in x.items()],
        }
        for t, x in zip(tokens, top, strict=True)
    ]
    return json.dumps(
        {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}
    )


def test_log_probs_are_those_of_the_verdict():
    inf = math.inf
    # Behind the last cue, whatever stood before it.
    tokens = ["A", " is", " good.", "\n", "Verdict", ":", " B"]
    top = [{"A": -0.1}, {}, {}, {}, {}, {}, {" B": -0.5, " A": -1.5}]
    answer = read_reply(reply("A is good.\nVerdict: B", tokens, top), COT)
    assert answer.logps == pytest.approx((-1.5, -0.5))
    # One that is not listed has no probability; the token itself counts though it is not listed.
    assert read_reply(reply("8", ["8"], [{"9": -1.0}]), SCORE).logps == (
        *[-inf] * 7, pytest.approx(-9.0), pytest.approx(-1.0), -inf,
    )  # fmt: skip
    assert read_reply(reply("10", ["10"], [{"10": -0.1, "1": -3.0}]), SCORE).logps[
        9
    ] == pytest.approx(-0.1)
    # A verdict of two tokens: the list of the first does not say how likely it is.
    assert read_reply(reply("10", ["1", "0"], [{"1": -0.1}, {"0": -0.1}]), SCORE).logps is None
    # What cannot be understood has none.
    assert read_reply(reply("Fine: 8", ["Fine", ":", " 8"], [{}, {}, {}]), SCORE).logps is None
    for odd in (None, {}, {"content": None}, {"content": [5]}, {"content": [{"token": "A"}]}):
        body = {"choices": [{"message": {"content": "8"}, "logprobs": odd}]}
        assert read_reply(json.dumps(body), SCORE).logps is None
    for no_reply in ("", "{}", '{"choices": [5]}', "[" * 100_000, '{"choices": [{"message": 5}]}'):
        with pytest.raises(ReplyError, match="no chat completion"):
            read_reply(no_reply, SCORE)
    body = '{"choices": [{"message": {"content": null}}], "usage": {"prompt_tokens": -3}}'
    assert read_reply(body, SCORE).text == "" and read_reply(body, SCORE).usage == Usage()


def test_with_chain_of_thought_there_is_room_for_it():
    with Server(lambda count, body: says("Verdict: A")) as server:
        asking = HttpAsk(config(server, top_logprobs=0), ThinkConfig(max_tokens=77))
        assert next(asking(questions(1)))[0].text == "Verdict: A"
    (body,) = server.asked
    assert body["max_tokens"] == 77 and "logprobs" not in body
