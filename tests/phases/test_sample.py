"""What is sampled becomes records of preferences: which responses, which scores, which prompts."""

import itertools
import json

import jax
import numpy as np
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.data import Examples, Fields, open_preferences, open_source
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.produce import produce
from alignjax.phases.registry import DATA_PHASES
from alignjax.phases.sample import expected_best
from alignjax.recipes.stage import run_data_phase
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *"abc ", "\n"]
CONFIG = """
phase: sample
name: s
output_dir: {root}/runs
seed: 3
model: {{path: {root}/model}}
data:
  train: {root}/prompts.jsonl
  text: {{fields: {{prompt: "{{q}}", reference: want}}}}
rollout: {{num_samples: 6, num_prompts: 3, max_prompt_tokens: 8, max_tokens: 5}}
rewards:
  functions: {{as: {{function: "{root}/mine.py:reward"}}}}
  num_workers: 1
"""
REWARD = """
def reward(completion, reference, **fields):
    if "cc" in completion:
        raise ValueError("no cc")
    return completion.count(reference)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    tokenizer = vocab_tokenizer(TOKENS)
    shape = ModelConfig(
        vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2,
        max_position_embeddings=16, initializer_range=0.05,
    )  # fmt: skip
    model = Model(shape)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save(folder / "model", model, model.init(jax.random.key(0)), extra_config=ids)
    tokenizer.save(str(folder / "model"))
    (folder / "mine.py").write_text(REWARD)
    with (folder / "prompts.jsonl").open("w") as file:
        for i, q in enumerate(["ab", "ba", "a", "b", "cab", "bc", "ac", "abc"]):
            print(json.dumps({"q": q, "want": "ab"[i % 2], "source": f"s{i}"}), file=file)
    return folder


def config_of(root, *overrides):
    tree = loads(CONFIG.format(root=root), list(overrides))
    return build(DATA_PHASES["sample"][0], tree)


def run(root, name, *overrides):
    """Records, figures and the best of a run."""
    config = config_of(root, f"name={name}", *overrides)
    file = run_data_phase(config, command="again")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    best = file.with_name("best.jsonl")
    return (
        records,
        json.loads(file.with_name("sample.json").read_text()),
        [json.loads(line) for line in best.read_text().splitlines()] if best.exists() else None,
    )


def test_records_scores_and_counts(root):
    records, figures, best = run(root, "judged", "rewards.max_failure_frac=1.0")
    prompts = [json.loads(line) for line in (root / "prompts.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == [p["q"] for p in prompts], "all, in order"
    assert [r["source"] for r in records] == [f"s{i}" for i in range(8)]
    for record in records:
        responses = record["responses"]
        assert len(set(responses)) == len(responses) >= 2
        assert all(response.strip() for response in responses)
        for response, score in zip(responses, record["scores"], strict=True):
            want = None if "cc" in response else response.count(record["reference"])
            assert score == want
        for response, length, cut in zip(
            responses, record["num_tokens"], record["is_truncated"], strict=True
        ):
            # The stop token is counted and not shown; what is cut has none. Nor are others that
            # are special.
            assert len(response) + (not cut) <= length <= 5
            assert not cut or length == 5
    assert figures["num_prompts"] == figures["num_records"] == 8
    assert figures["num_samples"] == 48
    left = figures["num_empty"] + figures["num_duplicates"]
    assert sum(len(r["responses"]) for r in records) == 48 - left
    assert left > 0 and figures["num_truncated"] > 0 and figures["num_failed_rewards"] > 0
    assert figures["num_left_out"] == 0
    for record, chosen in zip(records, best, strict=True):
        known = [s for s in record["scores"] if s is not None]
        assert chosen["score"] == max(known)
        assert record["scores"][record["responses"].index(chosen["completion"])] == max(known)
        assert (chosen["prompt"], chosen["source"]) == (record["prompt"], record["source"])


def test_the_file_is_read_by_those_who_come_after(root):
    run(root, "read", "rewards.max_failure_frac=1.0")
    folder = root / "runs" / "read"
    found = open_preferences(str(folder / "preferences.jsonl"))
    assert len(found) == 8 and found[0].scores is not None
    assert found[1].fields["source"] == "s1"
    best = Examples(
        open_source(str(folder / "best.jsonl")), Fields(prompt="prompt", completion="completion")
    )
    assert len(best) == 8


def test_best_of_k_is_the_mean_of_the_best_of_all_choices(root):
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 6):
        scores = rng.normal(size=n).round(1).tolist()
        for k in range(1, n + 1):
            choices = [max(chosen) for chosen in itertools.combinations(scores, k)]
            assert expected_best(scores, k) == pytest.approx(np.mean(choices))
    _, figures, _ = run(root, "best", "rewards.functions.as.function=format.length",
                        "rewards.functions.as.args={max_tokens: 3}")  # fmt: skip
    means = figures["reward_of_best_of"]
    assert list(means) == ["1", "2", "4", "6"]
    assert means["1"] < means["2"] < means["4"] < means["6"]
    assert figures["num_compared"] == 8


def test_a_run_is_continued_and_one_that_is_finished_left_alone(root, capsys):
    config = config_of(root, "rewards=null")
    phase_class = DATA_PHASES["sample"][1]

    def cut(after):
        class Cut(phase_class):
            def produce(self, state):
                if state["counts"]["num_prompts"] >= after:
                    raise KeyboardInterrupt
                return super().produce(state)

        return Cut(config, make_mesh(MeshConfig()))

    folders = [root / "a", root / "b"]
    for folder, after in zip(folders, (99, 3), strict=True):
        folder.mkdir()
        if after == 3:
            with pytest.raises(KeyboardInterrupt):
                produce(cut(3), folder, lambda _: None)
        produce(cut(99), folder, lambda _: None)
    one, other = ((folder / "preferences.jsonl").read_bytes() for folder in folders)
    assert one == other and len(one.splitlines()) == 8
    assert not any(b"scores" in line for line in one.splitlines()), "nobody judged"
    assert not (folders[0] / "best.jsonl").exists()


def test_what_cannot_be_compared_is_left_out_and_counted(root):
    records, figures, _ = run(root, "greedy", "rollout.temperature=0.0", "rewards=null")
    assert records == []
    assert figures["num_left_out"] == 8
    assert figures["num_duplicates"] + figures["num_empty"] in (40, 48)


def test_a_limit_on_prompts_and_cut_completions(root):
    records, figures, _ = run(root, "limit", "data.num_prompts=4", "truncated=drop", "rewards=null")
    assert figures["num_prompts"] == 4, "of two batches of three"
    assert figures["num_truncated"] > 0
    assert records and not any(cut for record in records for cut in record["is_truncated"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["prompts_as=messages"], [{"role": "user", "content": "ab"}]),
        (
            ["data.text.chat=true", "data.text.system=b"],
            [{"role": "system", "content": "b"}, {"role": "user", "content": "ab"}],
        ),
        (["data.text.chat=true", "prompts_as=text"], "ab"),
    ],
)
def test_prompts_as_text_or_messages(root, overrides, expected):
    name = "p" + str(len(overrides)) + type(expected).__name__
    chat = root / "chat.jinja"
    chat.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    overrides = [*overrides, f"data.text.chat_template={chat}", "data.num_prompts=1"]
    records, _, best = run(root, name, *overrides, "rewards.max_failure_frac=1.0")
    assert records[0]["prompt"] == expected
    if isinstance(expected, list):
        assert best[0]["messages"][:-1] == expected
        assert best[0]["messages"][-1]["role"] == "assistant"


def test_faults(root):
    with pytest.raises(UserError, match="exceed the model's context of 16 tokens"):
        run(root, "long", "rollout.max_tokens=9")
    with pytest.raises(UserError, match=r"more than max_failure_frac=0 allows.*no cc"):
        run(root, "failing", "rewards.max_failure_frac=0.0", "rollout.num_samples=32")
    with pytest.raises(UserError, match=r"needs data\.text\.fields\.prompt"):
        config_of(root, "prompts_as=text", "data.text.fields={messages: m}")
    run(root, "claimed", "rewards=null")
    with pytest.raises(UserError, match="another config"):
        run(root, "claimed", "rewards=null", "seed=4")
