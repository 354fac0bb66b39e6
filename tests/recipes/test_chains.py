"""The arithmetic world: its text, its split, the quality of its corpus."""

import hashlib
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import pytest

from alignjax.recipes import chains
from alignjax.rewards import format as shape
from alignjax.rewards import verify

OPS = (2, 3, 3, 3)
TOKEN = re.compile("|".join(map(re.escape, sorted(chains.TOKENS, key=len, reverse=True))))


def tokens(text: str) -> list[str]:
    found = TOKEN.findall(text)
    assert "".join(found) == text
    return found


def value_of(prompt: str) -> int:
    """Left to right, from the text alone; every value must be in 0..99."""
    value = int(prompt[:2])
    assert 2 <= value <= 49
    for op, operand in re.findall(r"([-+*])(\d\d)", prompt[2:]):
        n = int(operand)
        assert n in ((2, 3) if op == "*" else range(1, 10))
        value = value * n if op == "*" else value + n if op == "+" else value - n
        assert 0 <= value <= 99
    return value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a world")
    chains.write(
        folder, seed=0, num_questions=20_000, num_drills=5_000, num_train=2_000, num_test=600
    )
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_vocabulary() -> None:
    assert len(chains.TOKENS) == len(set(chains.TOKENS)) == 23


def test_one_problem_by_hand() -> None:
    problem = chains.Problem(12, (("*", 3), ("-", 9), ("+", 8)))
    assert problem.prompt == "12*03-09+08="
    assert [str(s) for s in problem.steps] == ["12*03=36;", "36-09=27;", "27+08=35;"]
    assert problem.answer == 35
    assert problem.is_held_out == (zlib.crc32(b"12*03-09+08=") % 10 == 0)


def test_problems_and_references(world: Path) -> None:
    for name, count in (("train", 2_000), ("test", 600)):
        records = read(world / f"{name}.jsonl")
        assert len(records) == count == len({r["prompt"] for r in records})
        for record in records:
            assert set(record) == {"prompt", "reference"}
            assert re.fullmatch(r"\d\d([-+*]\d\d){2,3}=", record["prompt"])
            assert record["reference"] == f"{value_of(record['prompt']):02d}"
        three = sum(len(r["prompt"]) == 12 for r in records) / count
        assert 0.70 < three < 0.80


def test_held_out_problems_occur_nowhere_else(world: Path) -> None:
    held_out = {r["prompt"] for r in read(world / "test.jsonl")}
    train = {r["prompt"] for r in read(world / "train.jsonl")}
    asked = {r["text"].strip().split("=")[0] + "=" for r in read(world / "corpus.jsonl")}
    assert not held_out & (train | asked)
    assert all(zlib.crc32(p.encode()) % 10 == 0 for p in held_out)
    chains_asked = {p for p in train | asked if len(p) > 6}  # longer than a single fact
    assert len(chains_asked) > 5_000
    assert not [p for p in chains_asked if zlib.crc32(p.encode()) % 10 == 0]


def test_drills_do_not_work_through_held_out_problems() -> None:
    draw = chains.Draw("drills")
    for _ in range(300):
        problem = draw.problem(OPS, is_held_out=False)
        text = draw.drill(problem, wrong_frac=0.0)
        facts = re.findall(r"(\d\d)([-+*])(\d\d)=(\d\d);", text)
        working = "".join("{}{}{}={};".format(*f) for f in facts)
        for left, op, right, value in facts:
            assert int(value) == chains.apply(int(left), op, int(right))
        if text.startswith(" "):
            assert working == "".join(map(str, problem.steps))
            answer = f"<answer>{problem.answer:02d}</answer>"
            assert text == f" {problem.prompt}<think>{working}</think>{answer}"
        else:
            assert text == working and len(facts) == 4


def classify(completion: str) -> str:
    match = re.fullmatch(r"(?:<think>(.*)</think>)?<answer>\d\d</answer>", completion)
    assert match, completion
    return "bare" if match[1] is None else "steps" if match[1] else "empty"


def test_quality_of_the_corpus(world: Path) -> None:
    lines = [r["text"] for r in read(world / "corpus.jsonl")]
    records = [r for r in read(world / "corpus.jsonl") if r["prompt"]]
    assert all(r["text"] == r["prompt"] + r["completion"] for r in records)
    questions = [(r["prompt"].removesuffix("="), r["completion"]) for r in records]
    assert len(lines) == 25_000 and len(questions) == 20_000
    kinds = Counter(classify(c) for _, c in questions)
    assert kinds["empty"] / 20_000 == pytest.approx(0.55, abs=0.012)
    assert kinds["bare"] / 20_000 == pytest.approx(0.20, abs=0.01)
    assert kinds["steps"] / 20_000 == pytest.approx(0.25, abs=0.01)
    right = Counter()
    full = written = wrong = repaired = 0
    for prompt, completion in questions:
        kind = classify(completion)
        number_of_ops = len(re.findall(r"[-+*]", prompt))
        *working, answer = re.split(r";|</think>", completion.removeprefix("<think>"))
        working = [w for w in working if w]
        unrepaired = [w for w in working if not w.startswith("wait:")]
        if kind == "steps" and len(unrepaired) == number_of_ops:
            kind, full = "full", full + 1
            assert working[-1][-2:] == re.findall(r"\d\d", answer)[0]
        value = int(prompt[:2])
        for step in working:
            left, op, n, result = re.fullmatch(
                r"(?:wait:)?(\d\d)([-+*])(\d\d)=(\d\d)", step
            ).groups()
            truth = chains.apply(int(left), op, int(n))
            if step.startswith("wait:"):
                repaired += 1
                assert int(result) == truth
            else:
                written, wrong = written + 1, wrong + (int(result) != truth)
                assert int(left) == value  # it goes on from what was written
            value = int(result)
        right[kind] += int(re.findall(r"\d\d", answer)[0]) == value_of(prompt)
    assert full / 20_000 == pytest.approx(0.10, abs=0.008)
    assert right["empty"] / kinds["empty"] == pytest.approx(0.15, abs=0.012)
    assert right["bare"] / kinds["bare"] == pytest.approx(0.15, abs=0.02)
    assert wrong / written == pytest.approx(0.10, abs=0.012)
    assert repaired / wrong == pytest.approx(1 / 3, abs=0.06)
    # all steps right or repaired: 0.75 (1 - 0.2/3)^3 + ..., a little more since slips can cancel
    assert 0.75 < right["full"] / full < 0.90


def test_drills_are_two_percent_wrong(world: Path) -> None:
    drills = [r["text"] for r in read(world / "corpus.jsonl") if not r["prompt"]]
    facts = [f for d in drills for f in re.findall(r"(\d\d)([-+*])(\d\d)=(\d\d);", d)]
    wrong = sum(int(v) != chains.apply(int(a), op, int(b)) for a, op, b, v in facts)
    assert len(drills) == 5_000 and wrong / len(facts) == pytest.approx(0.02, abs=0.005)


def test_every_row_fits(world: Path) -> None:
    """BOS, prompt, completion and EOS are at most 64 tokens; right working at most 48."""
    corpus = [tokens(r["text"]) for r in read(world / "corpus.jsonl")]
    assert max(len(t) + 2 for t in corpus) <= 57
    draw = chains.Draw("lengths")
    problems = [draw.problem(OPS, is_held_out=False) for _ in range(500)]
    rows = [
        len(tokens(f"{p.prompt}<think>{''.join(map(str, p.steps))}</think><answer>00</answer>")) + 2
        for p in problems
    ]
    assert max(rows) == 13 + 34
    assert {t for row in corpus for t in row} == set(chains.TOKENS) - {chains.BOS, chains.EOS}


def test_the_reward_is_made_of_built_ins() -> None:
    draw = chains.Draw("reward")
    tags = ["think", "answer"]
    values = Counter()
    for _ in range(300):
        problem = draw.problem(OPS, is_held_out=False)
        completion, gold = draw.response(problem), f"{problem.answer:02d}"
        value = 0.9 * verify.exact(problem.prompt, completion, gold, required_tags=tags)
        value += 0.1 * shape.tags(problem.prompt, completion, gold)
        is_right = completion.endswith(f"<answer>{gold}</answer>")
        expected = 0.0 if "<think>" not in completion else 1.0 if is_right else 0.1
        assert value == pytest.approx(expected)
        values[expected] += 1
    assert set(values) == {0.0, 0.1, 1.0}


def test_the_same_world_on_every_machine(tmp_path: Path) -> None:
    """Digests of the bytes, so that a change of the generator, or of Python, is seen."""
    for folder in ("a", "b"):
        chains.write(
            tmp_path / folder, seed=3, num_questions=50, num_drills=20, num_train=30, num_test=30
        )
    files = ["corpus.jsonl", "train.jsonl", "test.jsonl"]
    digests = {f: hashlib.sha256((tmp_path / "a" / f).read_bytes()).hexdigest()[:12] for f in files}
    for f in files:
        assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
    assert digests == {
        "corpus.jsonl": "63d207ee84aa",
        "train.jsonl": "cda6d4c392de",
        "test.jsonl": "00aecb2f8de4",
    }


def test_a_longer_corpus_changes_no_problem(tmp_path: Path) -> None:
    sizes = {"num_drills": 5, "num_train": 10, "num_test": 10}
    chains.write(tmp_path / "a", seed=1, num_questions=5, **sizes)
    chains.write(tmp_path / "b", seed=1, num_questions=9, **sizes)
    chains.write(tmp_path / "c", seed=2, num_questions=5, **sizes)
    a, b, c = ((tmp_path / d / "train.jsonl").read_bytes() for d in "abc")
    assert a == b != c


def test_more_problems_than_there_are() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        chains.make_problems(0, "test", 200, (1,))
