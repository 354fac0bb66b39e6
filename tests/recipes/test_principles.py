"""The world of principles: what the checker says, by hand; what the corpus teaches, by count."""

import json
from collections import Counter
from pathlib import Path

import pytest

from alignjax.recipes import principles
from alignjax.recipes.manners import QUESTIONS
from alignjax.rewards.constitution import load_constitution
from alignjax.rewards.critique_template import load_critique_template
from alignjax.text import load_tokenizer

PROMPT = "ann asks about tea and rain:"
GOOD = " hello ann quite tea is warm and very rain is wet"


@pytest.mark.parametrize(
    ("completion", "expected", "helpful"),
    [
        (GOOD, "", 1),
        (" hello ann oaf tea is warm and very rain is wet", "rude", 1),
        (" hello ann quite tea is warm and 7 rain is hard", "numbers", 0.5),
        (" so ann quite tea is cold and very rain is hard", "greeting", 0),
        (GOOD + " to be plain", "long", 1),  # 11 words and 3.
        (GOOD + " fine", "", 1),  # Twelve words.
        (" so ann oaf rain is wet and 7 tea is warm in my view", "rude numbers greeting long", 1),
        ("", "greeting", 0),
        # Of one thing two answers: it does not count. What was not asked is worth nothing.
        (" hello tea is warm and tea is cold", "", 0),
        (" hello snow is white and rain is wet", "", 0.5),
        # A greeting counts in the first place alone; control tokens are words.
        (" ann hello", "greeting", 0),
        ("<critique> hello", "greeting", 0),
    ],
)
def test_the_checker(completion, expected, helpful):
    found = principles.broken(completion)
    assert [name for name, is_broken in found.items() if is_broken] == expected.split()
    assert principles.helpful(PROMPT, completion) == helpful
    truth = principles.truth(PROMPT, completion, source="ignored")
    assert truth["reward"] == -len(expected.split()) and truth["helpful"] == helpful
    assert truth | found == truth


def test_the_judge_that_knows():
    def judge(first, second, question="rude", noise=0.0):
        return principles.true_judge(PROMPT, first, second, question, noise=noise)

    rude = " hello ann oaf tea is warm and very rain is wet"
    assert (judge(GOOD, rude), judge(rude, GOOD), judge(rude, rude)) == (1, 0, 0.5)
    assert judge(GOOD, rude, "long") == 0.5
    assert (judge(GOOD, rude, noise=1.0), judge(rude, GOOD, noise=1.0)) == (0, 1)
    # A word that it is fond of counts where the principle decides nothing.
    fond = principles.true_judge(PROMPT, GOOD, rude, "long", fond_of="quite")
    assert (fond, principles.true_judge(PROMPT, rude, GOOD, "long", fond_of="quite")) == (1, 0)
    assert principles.true_judge(PROMPT, GOOD, GOOD, "long", fond_of="quite") == 0.5
    assert principles.true_judge(PROMPT, rude, GOOD, "rude", fond_of="oaf") == 0
    # A pair is turned round in both orders, or in none.
    pairs = [(GOOD + f" {n}", rude + f" {n}") for n in range(500)]
    forward = [judge(a, b, noise=0.2) for a, b in pairs]
    assert [1 - judge(b, a, noise=0.2) for a, b in pairs] == forward
    assert sum(forward) / 500 == pytest.approx(0.8, abs=0.06)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a world")
    principles.write(folder, seed=0, num_lines=20_000)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(record):
    """Of a line of the corpus: the question, the answers, the principle and what was said."""
    before, _, rest = record["prompt"].partition(":")
    return before + ":", rest


def test_every_prompt_is_in_one_split_and_what_is_trained_on_in_that_of_training(world):
    splits = {s: {r["prompt"] for r in read(world / f"{s}.jsonl")}
              for s in ("train", "validation", "test")}  # fmt: skip
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == len(QUESTIONS)
    assert 0.2 < len(splits["test"]) / 1056 < 0.3 and 0.1 < len(splits["validation"]) / 1056 < 0.16
    asked = {parts(r)[0] for name in ("corpus", "helpful") for r in read(world / f"{name}.jsonl")}
    assert asked == splits["train"]


def test_answers_break_each_principle_apart_from_the_others(world):
    answers = [r for r in read(world / "corpus.jsonl") if r["prompt"].endswith(":")
               and "<" not in r["prompt"]]  # fmt: skip
    assert len(answers) == 3_334
    found = [principles.broken(r["completion"]) for r in answers]
    for name in principles.PRINCIPLES:
        assert sum(f[name] for f in found) / len(answers) == pytest.approx(0.4, abs=0.025)
        others = [f for f in found if f[name]]
        for other in set(principles.PRINCIPLES) - {name}:
            share = sum(f[other] for f in others) / len(others)
            assert share == pytest.approx(0.4, abs=0.04), (name, other)
    right = [principles.helpful(**r) for r in answers]
    assert sum(right) / len(answers) == pytest.approx(0.85, abs=0.01)
    # No principle but the one on length changes it: 11 words without fillers.
    short = {len(r["completion"].split()) for r, f in zip(answers, found, strict=True)
             if not f["long"]}  # fmt: skip
    assert short == {11}


def test_critiques_and_revisions_are_right_as_often_as_they_should_be(world):
    right, mended, copied = Counter(), Counter(), Counter()
    for record in read(world / "corpus.jsonl"):
        if "<critique>" not in record["prompt"]:
            continue
        answer, _, rest = parts(record)[1].partition("<critique> ")
        principle, _, said = rest.partition(":")
        critique, mark, _ = said.partition("<revision>")
        is_broken = principles.broken(answer)[principle]
        if not mark:
            right[is_broken, (record["completion"] != " fine") == is_broken] += 1
            continue
        revision = record["completion"]
        if not (is_broken and critique != " fine"):
            copied[revision == answer] += 1
            continue
        now, before = principles.broken(revision), principles.broken(answer)
        mended[not now[principle]] += 1
        others = set(principles.PRINCIPLES) - {principle}
        assert {n: now[n] for n in others} == {n: before[n] for n in others}
        assert principles.helpful(PROMPT, revision) == principles.helpful(PROMPT, answer)
    assert copied[False] == 0
    for is_broken in (False, True):
        share = right[is_broken, True] / (right[is_broken, True] + right[is_broken, False])
        assert share == pytest.approx(0.85, abs=0.02)
    assert mended[True] / mended.total() == pytest.approx(0.8, abs=0.03)


def test_comparisons_have_a_bias_for_the_first_place(world):
    first, orders = {1: [], 0: [], -1: []}, Counter()
    for record in read(world / "corpus.jsonl"):
        if principles.COMPARE not in record["prompt"]:
            continue
        texts, *said = (parts(record)[1] + record["completion"]).split(principles.COMPARE)
        one, other = texts.removeprefix(principles.FIRST).split(principles.SECOND)
        verdicts = dict(one_said.split(":") for one_said in said)
        assert {name.strip() for name in verdicts} == {*principles.PRINCIPLES}
        orders[tuple(verdicts)] += 1
        for name, verdict in verdicts.items():
            gain = principles.broken(other)[name.strip()] - principles.broken(one)[name.strip()]
            first[gain].append(verdict == " A")
    assert len(orders) == 24, "each principle stands first, as it does where a judge is asked"
    shares = {gain: sum(found) / len(found) for gain, found in first.items()}
    assert shares == pytest.approx({1: 0.95, 0: 0.65, -1: 0.35}, abs=0.03)


def test_prompts_are_those_that_the_templates_write(world):
    """What the phases ask is what the corpus has taught, token by token."""
    constitution = load_constitution(str(world / "constitution.yaml"))
    template = load_critique_template(principles.CRITIQUE_TEMPLATE)
    assert [p.name for p in constitution.principles] == [*principles.PRINCIPLES]
    rude = constitution.principles[0]
    asked = template.for_critique(rude, PROMPT, GOOD)
    assert asked == f"{PROMPT}{GOOD}<critique> rude:"
    assert template.for_revision(rude, PROMPT, GOOD, " fine") == f"{asked} fine<revision>"
    corpus = read(world / "corpus.jsonl")
    shapes = {"<critique>", "<revision>", principles.COMPARE}
    assert all(any(shape in r["prompt"] for r in corpus) for shape in shapes)
    tokenizer = load_tokenizer(world / "tokenizer")
    longest = 0
    for record in corpus[:400]:
        text = record["prompt"] + record["completion"]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(record["prompt"]) + tokenizer.encode(record["completion"])
        longest = max(longest, len(ids))
    assert longest <= 70, "with BOS and EOS it fits into a context of 72"
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode(asked)]
    assert tokens[-3:] == ["<critique>", " rude", ":"]


def test_a_seed_is_a_world(tmp_path, world):
    principles.write(tmp_path / "same", seed=0, num_lines=20_000)
    principles.write(tmp_path / "other", seed=1, num_lines=20_000)
    for name in ("corpus.jsonl", "helpful.jsonl", "train.jsonl", "test.jsonl"):
        text = (world / name).read_text()
        assert (tmp_path / "same" / name).read_text() == text
        assert (tmp_path / "other" / name).read_text() != text
    shown = [principles.broken(r["completion"]) for r in read(world / "helpful.jsonl")]
    assert sum(f["rude"] for f in shown) / len(shown) == pytest.approx(0.4, abs=0.06)
    assert all(principles.helpful(**r) == 1 for r in read(world / "helpful.jsonl"))
