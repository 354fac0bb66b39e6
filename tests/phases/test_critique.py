"""Answers, critiques and revisions: who reads what, what is kept, and what is left out and why."""

import json

import jax
import numpy as np
import pytest

from alignjax.core.config import build, loads
from alignjax.core.errors import UserError
from alignjax.core.types import LENGTH, STOP, Completions
from alignjax.data import Examples, Fields, open_source
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.produce import PROGRESS, produce
from alignjax.phases.registry import DATA_PHASES
from alignjax.recipes.stage import run_data_phase
from alignjax.rewards.constitution import load_constitution
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ?!:<>\n", "<critique>",
          "<revision>"]  # fmt: skip
CONSTITUTION = """
name: small
principles:
  - {name: kind, critique: "rude?", revision: be kind, comparison: "kinder?"}
  - {name: short, critique: "long?", revision: be short, comparison: "shorter?"}
"""
CHAT_TEMPLATE = """
chat: true
critique: "c {{ principle.critique }}"
revision: "r {{ principle.revision }}"
"""
CONFIG = """
phase: critique
name: c
output_dir: {root}/runs
seed: 3
model: {{path: {root}/model}}
data:
  train: {root}/prompts.jsonl
  text: {{fields: {{prompt: "{{q}}:"}}}}
constitution: {{path: {root}/constitution.yaml}}
template: critique_text
num_rounds: 2
rollout:
  num_prompts: 3
  max_prompt_tokens: 8
  response: {{max_tokens: 6}}
  critique: {{max_tokens: 5}}
  revision: {{max_tokens: 6}}
"""
PHASE_CONFIG, PHASE = DATA_PHASES["critique"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critique")
    shape = ModelConfig(
        vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2,
        max_position_embeddings=48, initializer_range=0.05,
    )  # fmt: skip
    model = Model(shape)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save(folder / "model", model, model.init(jax.random.key(0)), extra_config=ids)
    vocab_tokenizer(TOKENS).save(str(folder / "model"))
    (folder / "constitution.yaml").write_text(CONSTITUTION)
    (folder / "template.yaml").write_text(CHAT_TEMPLATE)
    (folder / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}"
        "{% endfor %}"
    )
    with (folder / "prompts.jsonl").open("w") as file:
        for i, q in enumerate(["ab", "ba", "a", "b", "cab", "bc", "ac"]):
            print(json.dumps({"q": q, "source": f"s{i}"}), file=file)
    return folder


def config_of(root, *overrides):
    return build(PHASE_CONFIG, loads(CONFIG.format(root=root), [*overrides]))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scripted(root, script, folder, *overrides):
    """Runs the phase with a model that says script(what it reads): a text, with "..." at its end
    if it is cut. Returns trace, revisions and figures, and all that was read, in order."""
    phase = PHASE(config_of(root, *overrides), make_mesh(MeshConfig()))
    tokenizer, asked = vocab_tokenizer(TOKENS), []

    keys = set()

    def generate(params, prompts, lengths, key, sampling):
        bits = tuple(jax.random.key_data(key).tolist())
        assert bits not in keys, "no key is used twice"
        keys.add(bits)
        texts = [tokenizer.decode(p[:n], skip_special=False)
                 for p, n in zip(prompts, lengths, strict=True)]  # fmt: skip
        texts = [text for text in texts for _ in range(sampling.num_samples)]
        asked.extend(texts)
        said = [script(text) for text in texts]
        cut = [text.endswith("...") for text in said]
        # Letter by letter: a model can spell out what is a token of its own.
        ids = [[*(TOKENS.index(c) for c in text.removesuffix("...")), *[2] * (not is_cut)]
               for text, is_cut in zip(said, cut, strict=True)]  # fmt: skip
        tokens = np.zeros((len(ids), sampling.max_tokens), np.int32)
        for row, one in zip(tokens, ids, strict=True):
            row[: len(one)] = one
        return Completions(
            tokens, np.array([*map(len, ids)], np.int32), np.zeros(tokens.shape, np.float32),
            np.where(cut, LENGTH, STOP).astype(np.int8),
        )  # fmt: skip

    phase._generate = generate
    folder.mkdir()
    produce(phase, folder, lambda _: None)
    return (
        read(folder / "trace.jsonl"),
        read(folder / "revisions.jsonl"),
        json.loads((folder / "critique.json").read_text()),
        asked,
    )


def test_each_step_reads_what_the_one_before_wrote(root, tmp_path):
    said = {
        "<bos>ab:": "x", "rude?:": "bad", "long?:": "eh", "bad<revision>": "y", "eh<revision>": "z",
    }  # fmt: skip
    trace, revisions, figures, asked = scripted(
        root, lambda text: next(v for k, v in said.items() if text.endswith(k)),
        tmp_path / "run", "data.num_prompts=1",
    )  # fmt: skip
    first = trace[0]["rounds"][0]["principle"]
    order = ["rude?", "long?"] if first == "kind" else ["long?", "rude?"]
    critique = {"rude?": "bad", "long?": "eh"}
    revision = {"rude?": "y", "long?": "z"}
    one = f"<bos>ab:x<critique> {order[0]}:"
    # The second round begins with the prompt and the answer as it is then.
    other = f"<bos>ab:{revision[order[0]]}<critique> {order[1]}:"
    assert asked == [
        "<bos>ab:", one, f"{one}{critique[order[0]]}<revision>",
        other, f"{other}{critique[order[1]]}<revision>",
    ]  # fmt: skip
    (record,) = trace
    final = revision[order[1]]
    assert (record["prompt"], record["response"], record["revision"]) == ("ab:", "x", final)
    assert [r["critique"] for r in record["rounds"]] == [critique[o] for o in order]
    assert [r["revision"] for r in record["rounds"]] == [revision[o] for o in order]
    assert [r["revision_num_tokens"] for r in record["rounds"]] == [2, 2], "with EOS"
    assert revisions == [{"prompt": "ab:", "completion": final, "source": "s0"}]
    assert figures["num_changed"] == figures["num_revisions"] == figures["num_critiques"] == 2
    assert figures["by_principle"]["kind"]["share_changed"] == 1
    assert len(figures["digests"]["constitution"]) == len(figures["digests"]["template"]) == 64


def test_turns_of_a_chat(root, tmp_path):
    trace, revisions, _, asked = scripted(
        root, lambda text: "x", tmp_path / "run", "data.num_prompts=1", "num_rounds=1",
        f"template={root}/template.yaml", "data.text.chat=true", "data.text.system=sys",
        f"data.text.chat_template={root}/chat.jinja",
    )  # fmt: skip
    of = {"kind": ("rude?", "be kind"), "short": ("long?", "be short")}
    critique, revision = of[trace[0]["rounds"][0]["principle"]]
    assert asked == [
        "sys ab: ", f"sys ab: x<eos>c {critique} ",
        f"sys ab: x<eos>c {critique} x<eos>r {revision} ",
    ]  # fmt: skip
    messages = [{"role": "system", "content": "sys"}, {"role": "user", "content": "ab:"}]
    assert trace[0]["prompt"] == messages
    assert revisions[0]["messages"] == [*messages, {"role": "assistant", "content": "x"}]
    assert len(Examples(open_source(str(tmp_path / "run/revisions.jsonl")),
                        Fields(messages="messages"))) == 1  # fmt: skip


def test_special_tokens_that_are_spelled_out_end_nothing(root, tmp_path):
    trace, _, _, asked = scripted(
        root, lambda text: "<eos>", tmp_path / "run", "data.num_prompts=1", "num_rounds=1",
        "rollout={response: {max_tokens: 6}, critique: {max_tokens: 6}, revision: {max_tokens: 6}, "
        "max_prompt_tokens: 8}",
        f"template={root}/template.yaml", "data.text.chat=true",
        f"data.text.chat_template={root}/chat.jinja",
    )  # fmt: skip
    # Of special tokens there is the template's own after each turn alone.
    assert [text.count("<eos>") for text in asked] == [0, 1, 2]
    assert [text.count("< eos>") for text in asked] == [0, 1, 2]
    assert trace[0]["response"] == trace[0]["revision"] == "<eos>", "written down as it was said"


def test_without_critiques_answers_are_revised_at_once(root, tmp_path):
    path = root / "direct.yaml"
    path.write_text(
        'chat: false\ncritique: null\nrevision: "{{ prompt }}{{ response }}<revision>"\n'
    )
    trace, _, figures, asked = scripted(
        root, lambda text: "y" if "<revision>" in text else "x", tmp_path / "run",
        f"template={path}", "data.num_prompts=1",
    )  # fmt: skip
    assert asked == ["<bos>ab:", "<bos>ab:x<revision>", "<bos>ab:y<revision>"]
    assert not any("critique" in r for r in trace[0]["rounds"])
    assert (figures["num_critiques"], figures["num_revisions"], figures["num_changed"]) == (0, 2, 1)


@pytest.mark.parametrize("way", ["discard", "keep"])
def test_what_is_cut_or_empty_is_counted_and_never_taken_unseen(root, tmp_path, way):
    """Three prompts: ab has a cut answer, ba an empty one, a none; b a cut critique, cab an empty
    one; bc a cut revision, ac an empty one."""

    def script(text):
        prompt = text.removeprefix("<bos>").partition(":")[0]
        step = 2 * ("<revision>" in text) + ("<critique>" in text and "<revision>" not in text)
        bad = {("ab", 0): "x...", ("ba", 0): " ", ("b", 1): "e...", ("cab", 1): "",
               ("bc", 2): "z...", ("ac", 2): ""}  # fmt: skip
        return bad.get((prompt, step), ("x", "e", "y")[step])

    trace, revisions, figures, asked = scripted(
        root, script, tmp_path / "run", f"truncated={way}", "num_rounds=1"
    )
    found = {r["source"]: r for r in trace}
    faults = {s: r["fault"] or (r["rounds"][0]["fault"] if r["rounds"] else None)
              for s, r in found.items()}  # fmt: skip
    is_cut = way == "discard"
    cut = {f"s{i}": f"{name} was cut at max_tokens" if is_cut else None
           for i, name in ((0, "response"), (3, "critique"), (5, "revision"))}  # fmt: skip
    assert faults == cut | {
        "s1": "response is empty", "s2": None, "s4": "critique is empty", "s6": "revision is empty",
    }  # fmt: skip
    assert {s: r["revision"] for s, r in found.items()} == {
        "s0": None if is_cut else "y", "s1": None, "s2": "y", "s3": None if is_cut else "y",
        "s4": None, "s5": None if is_cut else "z", "s6": None,
    }  # fmt: skip
    assert [r["source"] for r in revisions] == [s for s, r in found.items() if r["revision"]]
    assert found["s6"]["rounds"][0]["revision"] == "", "kept for reading"
    counts = {name: figures[f"num_{name}"] for name in (
        "prompts", "records", "cut_responses", "empty_responses", "cut_critiques",
        "empty_critiques", "cut_revisions", "empty_revisions", "left_out",
    )}  # fmt: skip
    assert counts == {
        "prompts": 7, "records": 7, "cut_responses": 1, "empty_responses": 1, "cut_critiques": 1,
        "empty_critiques": 1, "cut_revisions": 1, "empty_revisions": 1,
        "left_out": 6 if is_cut else 3,
    }  # fmt: skip
    assert figures["num_critiques"] == (5 if is_cut else 6)
    assert figures["num_revisions"] == (3 if is_cut else 5)
    assert len(asked) == 7 + figures["num_critiques"] + figures["num_revisions"]
    kinds = figures["by_principle"].values()
    assert sum(kind["num_rounds"] for kind in kinds) == figures["num_critiques"]
    assert sum(kind["num_failed"] for kind in kinds) == (4 if is_cut else 2)
    assert sum(kind["num_changed"] for kind in kinds) == figures["num_changed"]


def test_a_round_that_failed_leaves_the_answer_as_it_was(root, tmp_path):
    def script(text):
        step = "revision" if "<revision>" in text else "critique" if "<critique>" in text else ""
        if step == "revision":
            return "" if "rude?" in text else "y"
        return "e" if step else "x"

    trace, revisions, figures, _ = scripted(root, script, tmp_path / "run")
    for record in trace:
        by = {r["principle"]: r for r in record["rounds"]}
        assert by["kind"]["fault"] == "revision is empty" and by["short"]["fault"] is None
        assert record["revision"] == "y" and record["revision_num_tokens"] == 2
    assert len(revisions) == 7 and figures["num_left_out"] == 0
    assert {r["rounds"][0]["principle"] for r in trace} == {"kind", "short"}, "in either order"
    assert figures["by_principle"]["kind"] == {
        "num_rounds": 7, "num_failed": 7, "num_changed": 0, "share_changed": None,
        "mean_length_change": None,
    }  # fmt: skip


def test_what_does_not_fit_is_counted(root, tmp_path):
    long = "rollout.critique.max_tokens=30"
    trace, revisions, figures, _ = scripted(root, lambda text: "xxxxx", tmp_path / "run", long)
    # BOS, a prompt of 2 to 4, 5 of the answer, <critique>, " rude?:" of 7: 16 to 18 of 48 - 30.
    assert figures["num_overlong"] == 0 and len(revisions) == 7
    trace, revisions, figures, _ = scripted(
        root, lambda text: "xxxxx", tmp_path / "other", "rollout.critique.max_tokens=31"
    )
    assert figures["num_overlong"] == 2, "cab: has 18, in both rounds"
    (record,) = [r for r in trace if r["revision"] is None]
    assert record["prompt"] == "cab:"
    assert record["rounds"][0]["fault"] == "critique does not fit into the context"


@pytest.fixture(scope="module")
def whole(root):
    """A run with the model as it is, and the phase that made it."""
    config = config_of(root, "name=whole", "rollout.num_samples=2", "truncated=keep")
    return run_data_phase(config, command="again").parent


def test_a_run_of_a_model(root, whole):
    trace, revisions = read(whole / "trace.jsonl"), read(whole / "revisions.jsonl")
    figures = json.loads((whole / "critique.json").read_text())
    assert [r["source"] for r in trace] == [f"s{i}" for i in range(7) for _ in range(2)]
    assert len({(r["source"], r["response"]) for r in trace}) > 7, "two samples, unlike mostly"
    orders = [tuple(r["principle"] for r in t["rounds"]) for t in trace if t["rounds"]]
    assert {*orders} == {("kind", "short"), ("short", "kind")}
    drawn = load_constitution(str(root / "constitution.yaml"))
    for i, record in enumerate(trace):  # By seed, prompt and sample, whatever batch it is in.
        order = [p.name for p in drawn.ordered(f"3/{i // 2}/{i % 2}")]
        assert [r["principle"] for r in record["rounds"]] == (order if record["rounds"] else [])
    assert figures["num_critiques"] > 0 and figures["num_changed"] > 0
    assert figures["num_records"] == 14 == len(revisions) + figures["num_left_out"]
    assert not (whole / PROGRESS).exists()
    fields = Fields(prompt="prompt", completion="completion")
    assert len(Examples(open_source(str(whole / "revisions.jsonl")), fields)) == len(revisions)


def test_a_run_is_continued_after_its_last_batch(root, whole, tmp_path):
    config = config_of(root, "name=whole", "rollout.num_samples=2", "truncated=keep")
    phase = PHASE(config, make_mesh(MeshConfig()))
    make, phase.produce = phase.produce, lambda state: interrupted(state)

    def interrupted(state):
        if state["counts"]["num_prompts"] >= 3:
            raise KeyboardInterrupt
        return make(state)

    with pytest.raises(KeyboardInterrupt):
        produce(phase, tmp_path, lambda _: None)
    phase.produce = make
    produce(phase, tmp_path, lambda _: None)
    for name in ("trace.jsonl", "revisions.jsonl", "critique.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_faults(root, tmp_path):
    def start(*overrides):
        return PHASE(config_of(root, *overrides), make_mesh(MeshConfig()))

    with pytest.raises(UserError, match="num_rounds=3, but the constitution has 2 principles"):
        start("num_rounds=3")
    with pytest.raises(UserError, match="constitution has 1 principles"):
        start("constitution.leave_out=[kind]")
    with pytest.raises(UserError, match="asks in messages of a chat, but prompts are plain text"):
        start("template=critique_chat")
    with pytest.raises(UserError, match="asks in plain text, but prompts are messages"):
        start("data.text.chat=true")
    with pytest.raises(UserError, match="exceed the model's context of 48 tokens"):
        start("rollout.response.max_tokens=41")
    with pytest.raises(UserError, match="exceed the model's context of 48 tokens"):
        start("rollout.revision.max_tokens=48")
    phase = start()
    state = phase.init() | {"digests": {"constitution": "other", "template": "other"}}
    with pytest.raises(UserError, match="has changed since the run began"):
        phase.produce(state)
