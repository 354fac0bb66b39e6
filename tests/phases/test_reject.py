"""Rejection sampling: what is kept, what is counted and why, and that it can be continued."""

import json

import jax
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.core.types import Sample, Score
from alignjax.data import Examples, Fields, open_source
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.produce import produce
from alignjax.phases.registry import DATA_PHASES
from alignjax.phases.reject import COUNTS, balanced, select
from alignjax.recipes.stage import run_data_phase
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *"abc "]
CONFIG = """
phase: reject
name: r
output_dir: {root}/runs
seed: 3
model: {{path: {root}/model}}
data:
  train: {root}/prompts.jsonl
  text: {{fields: {{prompt: q, reference: want}}}}
rollout: {{num_samples: 24, num_prompts: 3, max_prompt_tokens: 8, max_tokens: 6}}
rewards:
  functions:
    right: {{function: "{root}/mine.py:right"}}
    short: {{function: format.length, weight: 0.1, args: {{max_tokens: 3, slack: 4}}}}
  num_workers: 1
  max_failure_frac: 1.0
keep: {{right/count: {{at_least: 1, at_most: 2}}, short: {{at_least: 0.7}}}}
"""
REWARD = """
def right(completion, reference, **fields):
    if "cc" in completion:
        raise ValueError("no cc")
    return {"reward": float(reference in completion), "count": completion.count(reference)}
"""
PROMPTS = ["ab", "ba", "a", "b", "cab", "ab", "ac", "abc"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reject")
    tokenizer = vocab_tokenizer(TOKENS)
    model = Model(ModelConfig(
        vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2,
        max_position_embeddings=16, initializer_range=0.05,
    ))  # fmt: skip
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save(folder / "model", model, model.init(jax.random.key(0)), extra_config=ids)
    tokenizer.save(str(folder / "model"))
    (folder / "mine.py").write_text(REWARD)
    with (folder / "prompts.jsonl").open("w") as file:
        for i, q in enumerate(PROMPTS):
            print(json.dumps({"q": q, "want": "ab"[i % 2], "level": i // 4}), file=file)
    return folder


def config_of(root, *overrides):
    return build(DATA_PHASES["reject"][0], loads(CONFIG.format(root=root), list(overrides)))


def run(root, name, *overrides):
    """Records, and figures."""
    file = run_data_phase(config_of(root, f"name={name}", *overrides), command="again")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return records, json.loads(file.with_name("reject.json").read_text())


def sample(completion, count=1.0, short=1.0, value=1.0, **changes):
    """A completion, with its score."""
    score = Score(value, {"right/count": count, "short": short, "other": -9.0})
    return Sample(prompt="", completion=completion, **changes), score


def chosen(root, found, *overrides):
    samples, scores = zip(*found, strict=True)
    return select(config_of(root, *overrides), samples, scores)


FOUND = [
    sample("a", value=0.1), sample("b", count=0.0), sample("c", count=3.0),
    sample("d", short=0.69), sample("e", count=0.0, short=0.0), sample("f", is_truncated=True),
    sample("  "), sample("g", value=None), sample("h", value=0.5), sample("a\n", value=0.1),
    sample("i", value=0.5), sample("j k", value=0.9, count=2.0, short=0.7), sample(" j  k"),
]  # fmt: skip
WHY = {
    "num_below/right/count": 3, "num_below/short": 1, "num_truncated": 1, "num_empty": 1,
    "num_failed_rewards": 1, "num_duplicates": 2,
}  # fmt: skip


def test_what_is_kept_by_hand(root):
    """The best first, of equal ones the first; of duplicates the better; bounds are inclusive."""
    kept, why = chosen(root, FOUND)
    assert kept == [12, 8, 10, 0]
    assert {reason: why.count(reason) for reason in why} == WHY
    kept, why = chosen(root, FOUND, "max_per_prompt=2")
    assert kept == [12, 8] and why.count("num_over") == 2
    assert len(kept) + len(why) == len(FOUND)


def test_a_threshold_is_for_the_prompts_that_its_reward_is_for(root):
    found = [sample("a", short=0.1, fields={"kind": kind}) for kind in ("sum", "talk", "sum")]
    args = "{function: format.length, args: {max_tokens: 3}, where: {kind: talk}}"
    kept, why = chosen(root, found, f"rewards.functions.short={args}")
    assert kept == [0] and why == ["num_below/short", "num_duplicates"]


def test_as_many_of_each_value():
    records = [{"level": level, "n": n} for n, level in enumerate([1, 1, "b", 1, "b", 1, 1, "b"])]
    found, by_value = balanced(records, "level", seed=0)
    assert by_value == {'"b"': 3, "1": 5}
    assert [r["level"] for r in found].count(1) == [r["level"] for r in found].count("b") == 3
    assert [r["n"] for r in found] == sorted(r["n"] for r in found)
    draws = {tuple(r["n"] for r in balanced(records, "level", seed=seed)[0]) for seed in range(20)}
    assert len(draws) > 3 and {n for draw in draws for n in draw} == set(range(8))
    assert balanced([], "level", seed=0) == ([], {})


@pytest.fixture(scope="module")
def whole(root):
    return run(root, "whole", "balance=level")


def test_every_completion_is_kept_or_counted_once(root, whole):
    records, figures = whole
    assert figures["num_prompts"] == 7 and figures["num_repeated"] == 1, "ab comes twice"
    assert figures["num_samples"] == 7 * 24
    reasons = [name for name in figures if name.startswith("num_below/")]
    assert reasons == ["num_below/right/count", "num_below/short"]
    reasons += ["num_failed_rewards", "num_truncated", "num_empty", "num_duplicates", "num_over"]
    assert set(reasons) | {"num_kept", "num_samples"} < figures.keys()
    assert sum(figures[name] for name in reasons) + figures["num_kept"] == 7 * 24
    assert all(figures[name] for name in reasons if name != "num_over"), "each was seen"
    assert len(records) == figures["num_kept"] > 3
    assert {name for name in COUNTS if name != "num_below/"} < figures.keys()
    solved = {record["prompt"] for record in records}
    assert figures["num_unsolved"] == 7 - len(solved)


def test_records_are_good_and_read_by_sft(root, whole):
    records, _ = whole
    order = [PROMPTS.index(record["prompt"]) for record in records]
    assert order == sorted(order)
    for record in records:
        completion, want = record["completion"], record["reference"]
        assert want == "ab"[PROMPTS.index(record["prompt"]) % 2] and want in completion
        count = record["parts"]["right/count"]
        assert count == completion.count(want) and 1 <= count <= 2
        # The stop token is counted and not shown.
        assert len(completion) + 1 <= record["num_tokens"] <= 4
        short = 1 if record["num_tokens"] <= 3 else 0.75
        assert record["parts"]["short"] == pytest.approx(short)
        assert record["reward"] == pytest.approx(1 + 0.1 * short)
        assert record["level"] == PROMPTS.index(record["prompt"]) // 4
    pairs = [(r["prompt"], r["completion"]) for r in records]
    assert len(set(pairs)) == len(pairs)
    file = root / "runs" / "whole" / "kept.jsonl"
    fields = Fields(prompt="prompt", completion="completion", reference="reference")
    examples = Examples(open_source(str(file)), fields)
    assert [(examples[i].prompt, examples[i].completion) for i in range(len(examples))] == pairs


def test_balanced_file(root, whole):
    records, figures = whole
    text = (root / "runs" / "whole" / "balanced.jsonl").read_text()
    chosen = [json.loads(line) for line in text.splitlines()]
    least = min(sum(r["level"] == level for r in records) for level in (0, 1))
    assert [sum(r["level"] == level for r in chosen) for level in (0, 1)] == [least, least]
    assert figures["num_balanced"] == 2 * least
    assert all(record in records for record in chosen)


def test_at_most_so_many_of_each_prompt(root, whole):
    records, figures = run(root, "few", "max_per_prompt=1")
    prompts = [record["prompt"] for record in records]
    assert len(set(prompts)) == len(prompts)
    assert set(prompts) == {record["prompt"] for record in whole[0]}
    assert figures["num_over"] == whole[1]["num_kept"] - len(records) > 0
    for record in records:
        rivals = [r["reward"] for r in whole[0] if r["prompt"] == record["prompt"]]
        assert record["reward"] == max(rivals)


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_run_is_continued_where_it_was_cut(root, whole, after, tmp_path):
    phase_class = DATA_PHASES["reject"][1]

    class Cut(phase_class):
        def produce(self, state):
            if state["counts"]["num_prompts"] == after:
                raise KeyboardInterrupt
            return super().produce(state)

    config = config_of(root, "name=whole", "balance=level")
    with pytest.raises(KeyboardInterrupt):
        produce(Cut(config, make_mesh(MeshConfig())), tmp_path, lambda _: None)
    produce(phase_class(config, make_mesh(MeshConfig())), tmp_path, lambda _: None)
    for name in ("kept.jsonl", "balanced.jsonl", "reject.json"):
        expected = (root / "runs" / "whole" / name).read_bytes()
        assert (tmp_path / name).read_bytes() == expected, name


def test_messages(root):
    chat = root / "chat.jinja"
    chat.write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    records, _ = run(root, "chat", "data.text.chat=true", f"data.text.chat_template={chat}")
    assert [m["role"] for m in records[0]["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["keep={wrong: {at_least: 1}}"], r"no reward 'wrong'; there are right, short"),
        (["keep={short: {}}"], "this keeps everything"),
        (["keep={short: {at_least: 2, at_most: 1}}"], "nothing can be kept"),
        (["keep={}"], "keep"),
        (["rewards=null"], "rewards"),
        (["keep={right/size: {at_least: 1}}"], r"no reward gave a part 'right/size'; there are"),
        (["balance=topic"], r"prompts.jsonl:1.*balance: no field 'topic' \(fields there: level\)"),
    ],
)
def test_faults(root, overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        run(root, "faulty", *overrides)
