"""A judge's labels: ranks by hand, what is left out, agreement with people, going on."""

import json

import jax
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.data import open_preferences
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.label import ranks, win_rates
from alignjax.phases.label_agreement import agreement_with, judgements_of, same_task
from alignjax.phases.registry import DATA_PHASES
from alignjax.recipes.stage import run_data_phase
from alignjax.text import vocab_tokenizer
from tests.rewards.judge_server import Server, fails, says

JUDGE = """
def longer(prompt, first, second, **fields):
    assert "ranks" not in fields and "secret" not in fields
    return 0.5 + 0.1 * (len(first) > len(second)) - 0.1 * (len(first) < len(second)) + 0.2

def score(prompt, response):
    return 1.0 + min(len(response), 9)
"""
RECORDS = [
    {"prompt": "p0", "responses": ["aaa", "b", "cc"], "source": "s0"},
    {"prompt": [{"role": "user", "content": "p1"}], "responses": ["a", "bb"]},
    {"prompt": "p2", "responses": ["x", "y"], "win_rates": "mine"},
    {"prompt": "p3", "responses": ["xxx", "yy", "zzz", "v"]},
]


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder, records, name="responses.jsonl"):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder / name)


def config_of(folder, judge, **values):
    tree = {
        "phase": "label", "name": "labels", "output_dir": str(folder / "runs"), "judge": judge,
        **values,
    }  # fmt: skip
    return build(DATA_PHASES["label"][0], loads(json.dumps(tree)))


def run(folder, judge, **values):
    """Records and figures."""
    file = run_data_phase(config_of(folder, judge, **values), command="again")
    return records_of(file), json.loads(file.with_name("label.json").read_text())


@pytest.fixture
def longer(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return {"name": "long", "function": f"{tmp_path}/judge.py:longer"}


def test_win_rates_by_hand():
    # 0 beats 1 with 0.9 and 2 with 0.5; 1 beats 2 with 0.2.
    found = win_rates([0.9, 0.5, 0.2], 3)
    assert found == pytest.approx([(0.9 + 0.5) / 2, (0.1 + 0.2) / 2, (0.5 + 0.8) / 2])
    assert ranks(found) == [1, 3, 2]
    assert ranks([0.5, 0.7, 0.5 + 1e-12, 0.1]) == [2, 1, 2, 3]


def test_a_judge_ranks_a_file(tmp_path, longer):
    responses = written(tmp_path, RECORDS)
    found, figures = run(tmp_path, longer, responses=responses, num_prompts=3)
    assert [r["prompt"] for r in found] == [r["prompt"] for r in RECORDS]
    assert [r["ranks"] for r in found] == [[1, 3, 2], [2, 1], [1, 1], [1, 2, 1, 3]]
    # The bias of 0.2 to the first place is gone.
    assert found[0]["win_rates"] == pytest.approx([0.6, 0.4, 0.5])
    assert found[3]["win_rates"] == pytest.approx(
        [0.5 + 0.2 / 3, 0.5 - 0.1 / 3, 0.5 + 0.2 / 3, 0.4]
    )
    assert found[1]["preference_prob"] == pytest.approx(0.6)
    assert "preference_prob" not in found[0] and found[2]["win_rates"] == [0.5, 0.5]
    assert found[0]["source"] == "s0" and {r["annotator"] for r in found} == {"judge:long"}
    assert figures["first_is_preferred"] == pytest.approx(0.7)
    # With a bias of 0.2 and a preference of 0.1, the first place wins always.
    assert figures["orders_agree"] == pytest.approx(0)
    assert figures["num_questions"] == 3 + 1 + 1 + 6 and figures["num_records"] == 4
    assert figures["num_left_out"] == 0 and figures["agreement"] == {}
    read = open_preferences(str(tmp_path / "runs/labels/preferences.jsonl"))
    assert len(read) == 4 and read[0].annotator == "judge:long"
    read = open_preferences([str(tmp_path / "runs/labels/preferences.jsonl"),
                             written(tmp_path, [HUMAN[0]], "human.jsonl")])  # fmt: skip
    assert [p.annotator for p in read][-2:] == ["judge:long", "ann"], "both are one file"


HUMAN = [
    {"prompt": "p0", "responses": ["aaa", "b", "cc"], "ranks": [1, 3, 2], "annotator": "ann"},
    {"prompt": "p0", "responses": ["cc", "aaa", "b"], "ranks": [1, 2, 3], "annotator": "bob"},
    {"prompt": [{"role": "user", "content": "p1"}], "responses": ["a", "bb"], "ranks": [1, 2],
     "annotator": "ann", "flagged": True},
    {"prompt": "p2", "responses": ["x", "y"], "scores": [1.0, 0.0]},
]  # fmt: skip


def test_agreement_with_people(tmp_path, longer):
    """Of a file with their rankings, and of one beside it."""
    inside, figures = run(tmp_path, longer, responses=written(tmp_path, HUMAN))
    assert [r["ranks"] for r in inside] == [[2, 1, 3], [2, 1], [1, 1]], (
        "each task once, bob's order"
    )
    assert all("flagged" not in r and "comment" not in r for r in inside)
    ann, bob = figures["agreement"]["ann"], figures["agreement"]["bob"]
    # Of ann's three pairs of p0 all are the same, of p1 the only one is not: by prompt a half.
    assert (ann["num_prompts"], ann["num_pairs"], ann["same_order"]) == (2, 4, 0.5)
    assert (bob["num_prompts"], bob["num_pairs"]) == (1, 3)
    assert bob["same_order"] == pytest.approx(2 / 3) and bob["low"] < 2 / 3 < bob["high"]
    assert ann["alpha"] is not None and ann["alpha"] < 1
    nobody = figures["agreement"]["no annotator"]
    assert (nobody["num_prompts"], nobody["num_pairs"]) == (1, 0) and "same_order" not in nobody
    _, beside = run(
        tmp_path, longer, name="beside", responses=written(tmp_path, RECORDS, "bare.jsonl"),
        compare_with=written(tmp_path, HUMAN, "human.jsonl"),
    )  # fmt: skip
    assert beside["agreement"].keys() == {"ann", "bob", "no annotator"}
    assert beside["agreement"]["bob"] == bob
    with pytest.raises(UserError, match=r"compare_with: .*no record has ranks or"):
        judgements_of(written(tmp_path, RECORDS[:1], "none.jsonl"), named=True)
    with pytest.raises(UserError, match=r"wrong.jsonl:1: ranks: 1 values for 3 responses"):
        judgements_of(written(tmp_path, [HUMAN[0] | {"ranks": [1]}], "wrong.jsonl"), named=True)


def test_agreement_of_equals_is_whole_and_a_judge_is_not_compared_with_itself():
    record = HUMAN[0] | {"annotator": "judge:j"}
    key = same_task(record["prompt"], reversed(record["responses"]))
    order = {"aaa": 9.0, "cc": 2.0, "b": -1.0}
    found = agreement_with({key: {"ann": order, "judge:j": order}}, [record], "judge:j")
    assert list(found) == ["ann"]
    assert found["ann"]["alpha"] == 1.0 and found["ann"]["same_order"] == 1.0
    upside_down = {text: -value for text, value in order.items()}
    found = agreement_with({key: {"ann": upside_down}}, [record], "judge:j")
    assert found["ann"]["same_order"] == 0.0 and found["ann"]["alpha"] < 0


def test_scores(tmp_path, longer):
    judge = {"function": f"{tmp_path}/judge.py:score"}
    found, figures = run(
        tmp_path, judge, responses=written(tmp_path, RECORDS), method="pointwise"
    )  # fmt: skip
    assert found[0]["scores"] == pytest.approx([4, 2, 3]) and "ranks" not in found[0]
    assert found[0]["annotator"] == "judge:judge"
    assert "first_is_preferred" not in figures and figures["num_questions"] == 11


def by_text(body):
    """The reply to a question: the longer response, or nonsense on p2."""
    text = body["messages"][-1]["content"]
    first, second = (
        text.partition(f"[response {option} ")[2].partition("\n")[2].partition("\n")[0]
        for option in "AB"
    )
    if "\np2\n" in text:
        return says("hm")
    return says("A" if len(first) > len(second) else "B")


def test_what_is_not_understood_is_counted_and_left_out(tmp_path):
    responses = written(tmp_path, RECORDS)
    with Server(lambda count, body: by_text(body)) as server:
        judge = {"http": {"url": server.url, "model": "m", "backoff_s": 0.001}, "num_attempts": 2}
        found, figures = run(tmp_path, judge, responses=responses)
        assert len(server.asked) == 2 * 10 + 2 * 2
        with pytest.raises(UserError, match=r"1 of 11 judgements could not be understood, more th"):
            run(tmp_path, judge, responses=responses, name="x", max_unparsable_frac=0.05)
    assert [r["prompt"] for r in found] == [RECORDS[i]["prompt"] for i in (0, 1, 3)]
    assert figures["num_unparsable"] == 4 and figures["num_not_understood"] == 1
    assert figures["num_left_out"] == 1 and figures["num_failed"] == 0


def test_an_endpoint_that_dies_in_the_middle_loses_nothing(tmp_path):
    """The run stops, and goes on when there is an answer again; nothing is asked twice."""
    responses = written(tmp_path, RECORDS)

    def plan(count, body):
        return by_text(body) if count < 13 or state["is_back"] else fails(500)

    with Server(lambda count, body: by_text(body)) as server:
        url = {"url": server.url, "model": "m", "backoff_s": 0.001, "num_retries": 1}
        whole = {"name": "whole", "responses": responses, "num_prompts": 1}
        run(tmp_path, {"http": url, "num_attempts": 1}, **whole, max_unparsable_frac=1.0)
    state = {"is_back": False}
    with Server(plan) as server:
        cut = {"name": "cut", "responses": responses, "num_prompts": 1, "max_unparsable_frac": 1.0}
        judge = {"http": url | {"url": server.url}, "num_attempts": 1}
        with pytest.raises(UserError, match=r"judgements were not answered, .*kept: run again"):
            run(tmp_path, judge, **cut)
        assert not (tmp_path / "runs/cut/preferences.jsonl").exists()
        state["is_back"] = True
        run(tmp_path, judge, **cut)
        assert len(server.answered) == len(set(server.answered)) == 22
    for name in ("preferences.jsonl",):
        one, other = (tmp_path / "runs" / run_ / name for run_ in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()
    figures = [
        json.loads((tmp_path / "runs" / n / "label.json").read_text()) for n in ("whole", "cut")
    ]
    # The judge has another address; what it is made of is told by a digest.
    assert len({one.pop("judge") for one in figures}) == 2 and figures[0] == figures[1]


def test_a_budget_that_is_used_up_can_be_raised(tmp_path):
    """The run goes on with another limit, but not with another judge."""
    values = {"responses": written(tmp_path, RECORDS[:2]), "num_prompts": 1}
    with Server(lambda count, body: by_text(body)) as server:
        http = {"url": server.url, "model": "m", "concurrency": 1}
        with pytest.raises(UserError, match=r"max_requests=7 is used up \(7\)"):
            run(tmp_path, {"http": http | {"max_requests": 7}}, **values)
        with pytest.raises(UserError, match=r"judge.http.model: m -> other\nchoose"):
            run(tmp_path, {"http": http | {"max_requests": 8, "model": "other"}}, **values)
        found, _ = run(
            tmp_path, {"http": http | {"max_requests": 8, "concurrency": 2}}, **values,
            max_failure_frac=0.5,
        )  # fmt: skip
        assert len(found) == 2 and len(server.asked) == 8


TOKENS = ["<pad>", "<bos>", "<eos>", *"abc "]


def test_it_samples_what_it_judges(tmp_path, longer):
    model = Model(
        ModelConfig(vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2,
                    max_position_embeddings=16, initializer_range=0.05)
    )  # fmt: skip
    save(tmp_path / "model", model, jax.jit(model.init)(jax.random.key(0)),
         extra_config={"eos_token_id": 2})  # fmt: skip
    vocab_tokenizer(TOKENS).save(str(tmp_path / "model"))
    written(
        tmp_path, [{"q": q, "source": q} for q in ("ab", "b", "ca", "c", "ac")], "prompts.jsonl"
    )
    sample = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "prompts.jsonl"), "text": {"fields": {"prompt": "q"}}},
        "rollout": {"num_samples": 4, "num_prompts": 2, "max_prompt_tokens": 8, "max_tokens": 5},
    }
    found, figures = run(tmp_path, longer, sample=sample)
    assert len(found) == figures["num_records"] == figures["sample"]["num_records"] > 2
    assert figures["sample"]["num_samples"] == 20
    for record in found:
        lengths = [len(text) for text in record["responses"]]
        order = sorted(set(lengths), reverse=True)
        if len(lengths) == 2:
            assert record["ranks"] == [1 + order.index(n) for n in lengths]
        best = lengths[record["ranks"].index(1)]
        assert best == max(lengths) and record["source"] == record["prompt"]
    assert "num_tokens" in found[0]


def test_either_a_file_or_a_model(tmp_path):
    judge = {"function": "a.b"}
    data = {"train": "t", "text": {"fields": {"prompt": "p"}}}
    both = {"responses": "a.jsonl", "sample": {"model": {"path": "m"}, "data": data}}
    for given in ({}, both):
        with pytest.raises(UserError, match="give either responses"):
            config_of(tmp_path, judge, **given)
