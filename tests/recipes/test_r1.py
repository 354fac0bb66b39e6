"""What people do between the stages of R1, and the recipe itself in small."""

import itertools
import json
from collections import Counter

import pytest

from alignjax.core.errors import UserError
from alignjax.recipes import notations, r1


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


MIXED = "<think>₁₂ₓ₀₃₌₃₆;36-09=27;</think><answer>27</answer>"


def test_a_cold_start_is_made_readable_in_part(tmp_path):
    records = [{"prompt": f"p{i}", "completion": MIXED, "kind": "arithmetic"} for i in range(900)]
    # A second answer to a prompt is not taken.
    records += [{"prompt": f"p{i}", "completion": "another"} for i in range(900)]
    source = write(tmp_path / "kept.jsonl", records)
    r1.cold_start(tmp_path / "a", seed=0, source=source, num_examples=800)
    made = read(tmp_path / "a" / "train.jsonl")
    assert all(set(r) == {"prompt", "completion"} for r in made)
    assert len({r["prompt"] for r in made}) == len(made) == 800
    found = Counter(r["completion"] for r in made)
    assert set(found) == {MIXED, notations.to_x(MIXED)}
    assert found[notations.to_x(MIXED)] / 800 == pytest.approx(0.6, abs=0.05)
    for seed, frac in ((0, 0.6), (1, 0.6), (0, 0.0), (0, 1.0)):
        args = {"source": source, "num_examples": 800, "rewrite_frac": frac}
        r1.cold_start(tmp_path / f"{seed}{frac}", seed=seed, **args)
    assert read(tmp_path / "00.6" / "train.jsonl") == made != read(tmp_path / "10.6/train.jsonl")
    for frac, text in ((0.0, MIXED), (1.0, notations.to_x(MIXED))):
        assert {r["completion"] for r in read(tmp_path / f"0{frac}/train.jsonl")} == {text}
    with pytest.raises(UserError, match=r"900 prompts have a right answer, not num_examples=901"):
        r1.cold_start(tmp_path / "b", seed=0, source=source, num_examples=901)


GOOD, THINKS, RUDE, WRONG = "good", "thinks", "rude", "wrong"


def answers(letters):
    """To `copy letters=`, by what is to be said of them."""
    thoughts = {GOOD: ("", letters), THINKS: ("01+02=03;", letters), RUDE: ("", f"!{letters}"),
                WRONG: ("", f"{letters}h")}  # fmt: skip
    return {k: f"<think>{t}</think><answer>{a}</answer>" for k, (t, a) in thoughts.items()}


@pytest.fixture
def source(tmp_path):
    """Each prompt in both files: of all the answers, and of two of them."""
    letters = ["".join(x) for x in itertools.product("abcdefgh", repeat=3)]
    found = [(f"copy {x}=", list(answers(x).values())) for x in letters]
    first, second = (
        write(tmp_path / name, [{"prompt": p, "responses": r[start:]} for p, r in found])
        for name, start in (("first.jsonl", 0), ("second.jsonl", 2))
    )
    return [first, second]


@pytest.mark.parametrize(
    ("utility", "min_gap", "pairs"),
    [
        # 0.2 for a needless thought is not enough to tell answers apart.
        ("helpful", 0.3, {(GOOD, WRONG), (THINKS, WRONG), (RUDE, WRONG)}),
        ("helpful", 0.1, {(GOOD, WRONG), (THINKS, WRONG), (RUDE, WRONG),
                          (GOOD, THINKS), (RUDE, THINKS)}),
        ("safe", 0.3, {(GOOD, RUDE), (THINKS, RUDE), (WRONG, RUDE)}),
    ],
)  # fmt: skip
def test_people_compare_answers_of_unlike_worth(tmp_path, source, utility, min_gap, pairs):
    r1.compare(tmp_path / "a", seed=0, source=source, utility=utility, min_gap=min_gap)
    train, test = (read(tmp_path / f"a/{side}.jsonl") for side in ("train", "test"))
    # Two of the pairs of a prompt in the first file, and the one that is in the second.
    assert len(train + test) == 3 * 512
    assert len(test) / 1536 == pytest.approx(0.1, abs=0.04)
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    for side, noise in ((train, 0.1), (test, 0.0)):
        places, mistakes, seen = [], 0, set()
        for record in side:
            assert set(record) == {"prompt", "responses", "ranks"}
            first = record["ranks"].index(1)
            assert record["ranks"] == ([1, 2] if first == 0 else [2, 1])
            known = {text: name for name, text in answers(record["prompt"][5:-1]).items()}
            both = [known[response] for response in record["responses"]]
            said = (both[first], both[1 - first])
            is_right = said in pairs
            assert is_right or said[::-1] in pairs
            mistakes += not is_right
            seen.add(said if is_right else said[::-1])
            places.append(first)
        assert seen == pairs
        assert mistakes / len(side) == pytest.approx(noise, abs=0.03 if noise else 0)
        assert sum(places) / len(places) == pytest.approx(0.5, abs=0.1)


def test_what_cannot_be_compared(tmp_path, source):
    with pytest.raises(UserError, match="utility='kind': expected helpful or safe"):
        r1.compare(tmp_path / "a", seed=0, source=source, utility="kind")
    with pytest.raises(UserError, match=r"of the train side differ by more than min_gap=1.5 in"):
        r1.compare(tmp_path / "a", seed=0, source=source, utility="safe", min_gap=1.5)
