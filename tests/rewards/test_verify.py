"""Right, wrong and missing answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignjax.rewards import verify


def tagged(answer: str) -> str:
    return f"<think></think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("completion", "reference", "options", "expected"),
    [
        (tagged("07"), "07", {}, 1.0),
        (tagged("7"), "07", {}, 0.0),
        (tagged(" New   York\n"), "New York", {}, 1.0),
        (tagged("paris"), "Paris", {}, 0.0),
        (tagged("paris"), "Paris", {"ignore_case": True}, 1.0),
        (tagged("7"), 7, {}, 1.0),
        ("", "7", {}, 0.0),
        ("<think><answer>7</answer></think>", "7", {}, 0.0),
        ("so #### 7", "long story\n#### 7", {"place": "hashes", "reference_place": "hashes"}, 1.0),
        ("<answer>7</answer>", "7", {}, 1.0),
        ("<answer>7</answer>", "7", {"required_tags": ["think", "answer"]}, 0.0),
        (tagged("7") + "!", "7", {"required_tags": ["think", "answer"]}, 0.0),
        (tagged("7"), "7", {"required_tags": ["think", "answer"]}, 1.0),
    ],
)
def test_exact(completion: str, reference: object, options: dict, expected: float) -> None:
    assert verify.exact("q", completion, reference, **options) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "options", "expected"),
    [
        ("72", "72.0", {}, 1.0),
        ("1,000 clips", 1000, {}, 1.0),
        ("72.1", "72", {}, 0.0),
        ("72.1", "72", {"atol": 0.11}, 1.0),
        ("71.9", "72", {"atol": 0.11}, 1.0),
        ("103", "100", {"rtol": 0.03}, 1.0),
        ("104", "100", {"rtol": 0.03}, 0.0),
        ("-97", "-100", {"rtol": 0.03}, 1.0),
        ("72", "-72", {"rtol": 1e-3}, 0.0),
        ("71 72", "72", {}, 0.0),
        ("many", "72", {}, 0.0),
        ("", "72", {}, 0.0),
    ],
)
def test_numeric(answer: str, reference: object, options: dict, expected: float) -> None:
    assert verify.numeric("q", tagged(answer), reference, **options) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("72", "72", 1.0),
        ("072", "72", 1.0),
        ("73", "72", 0.0),
        ("-72", "72", 0.0),
        ("1,000", "1000", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        ("1/2", r"\frac{1}{2}", 1.0),
        (r"2\sqrt{2}", r"\sqrt{8}", 1.0),
        (r"$\{2, 1\}$", r"\{1, 2\}", 1.0),
        ("72.", "72", 1.0),
        ("70, 72", "72", 0.0),
        (r"1} \boxed{72", "72", 0.0),
        (r"\frac{1", "1", 0.0),
        ("", "72", 0.0),
    ],
)
def test_math(answer: str, reference: str, expected: float) -> None:
    assert verify.math("q", tagged(answer), reference, place="answer_tag") == expected


def test_math_reads_the_last_box() -> None:
    assert verify.math("q", r"\boxed{1}, no: \boxed{2}", "2") == 1.0
    assert verify.math("q", r"\boxed{2}, no: \boxed{1}", "2") == 0.0
    assert verify.math("q", "2", "2") == 0.0


@pytest.mark.parametrize("reward", [verify.exact, verify.numeric, verify.math])
def test_reference_without_an_answer_is_a_fault_not_a_zero(reward) -> None:
    for reference in (None, "", "  "):
        with pytest.raises(ValueError, match="no answer at 'all' in the reference"):
            reward("q", tagged("7"), reference)
    with pytest.raises(ValueError, match="no answer at 'hashes' in the reference '7'"):
        reward("q", tagged("7"), "7", reference_place="hashes")


def test_unreadable_gold() -> None:
    with pytest.raises(ValueError, match="'seven' is not one number"):
        verify.numeric("q", tagged("7"), "seven")
    with pytest.raises(ValueError, match="cannot read the reference"):
        verify.math("q", r"\boxed{7}", r"\frac{1")


PROBLEM = "Ann has 12 hens and 3 ducks, 1,200 eggs and $0.50."


@pytest.mark.parametrize(
    ("completion", "reference", "reward", "right", "written"),
    [
        ("12+3=<<12+3=15>>15, half of it <<15/2=7.5>>7.5", None, 1, 1, 2),
        ("<<12+3=15>> <<15/2=7>>", None, 1 / 2, 1 / 2, 2),
        ("<<12+3=14>> <<14*2=28>>", None, 0, 1 / 2, 2),  # 14 is the result of nothing that counts
        ("<<1200*0.5=600>>", None, 1, 1, 1),
        ("<<1,200*.50=600.00>>", None, 1, 1, 1),
        ("<<12*(3-1)=24>>", None, 1, 1, 1),
        ("<<-12+3=-9>>", None, 1, 1, 1),
        ("<<12/7=1.714>>", None, 0, 0, 1),  # gold ones are exact
        # What does not pay: nothing, nothing said, no use of the problem, the same again.
        ("", None, 0, 0, 0),
        ("12+3=15", None, 0, 0, 0),
        ("<<1=1>>", None, 0, 1, 1),
        ("<<12=12>>", None, 0, 1, 1),
        ("<<12*1=12>>", None, 0, 1, 1),
        ("<<12+0=12>>", None, 0, 1, 1),
        ("<<5+2=7>>", None, 0, 1, 1),
        ("<<12+3=15>> <<12+3=15>> <<12 + 3=15>>", None, 1 / 3, 1, 3),
        # The reference took 4 steps: one easy one is a quarter of the way.
        ("<<12+3=15>>", "<<1+2=3>><<1+2=3>><<1+2=3>><<1+2=3>>", 1 / 4, 1, 1),
        ("<<12+3=15>> <<12-3=9>>", "<<12-3=9>>", 1, 1, 2),
        # Not a calculation.
        ("<<12+3>> <<=15>> <<12+3=>> << <12+3=15>", None, 0, 0, 2),
        ("<<a+b=15>>", None, 0, 0, 1),
        ("<<12/0=0>>", None, 0, 0, 1),
        ("<<12**3=1728>>", None, 0, 0, 1),
        ("<<12//5=2>>", None, 0, 0, 1),
        ("<<12+3=15=15>>", None, 0, 0, 0),
    ],
)
def test_calculations(completion, reference, reward, right, written) -> None:
    assert verify.calculations(PROBLEM, completion, reference) == {
        "reward": pytest.approx(reward),
        "right": pytest.approx(right),
        "written": written,
    }


def test_gsm8k_references_verify_themselves(real_data: Path) -> None:
    lines = (real_data / "gsm8k" / "test-660.jsonl").read_text().splitlines()[:100]
    for record in map(json.loads, lines):
        answer = record["answer"]
        final = answer.split("####")[1].strip()
        for name in ("exact", "numeric", "math"):
            reward = getattr(verify, name)
            options = {"place": "boxed", "reference_place": "hashes"}
            assert reward("q", f"\\boxed{{{final}}}", answer, **options) == 1.0
            assert reward("q", f"\\boxed{{{final}1}}", answer, **options) == 0.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<<12+3=15>>", 1),
        ("<<12+3=10>>", 0.5 * (1 - 5 / 15)),
        ("<<12+3=20>>", 0.5 * (1 - 5 / 20)),
        ("<<3-12=9>>", 0),  # 18 beside the point, on a scale of 9
        ("<<3-3=9>>", 0),
        ("<<12+3=10>> <<12+3=10>>", 0.5 * (1 - 5 / 15) / 2),
        ("<<12+3=10>> <<10*2=20>>", 0.5 * (1 - 5 / 15) / 2),  # a wrong result is not known
        ("<<12+3=12>>", 0),
        ("<<12+0=11>>", 0),
        ("<<5+4=8>>", 0),
    ],
)
def test_calculations_in_part(completion: str, reward: float) -> None:
    got = verify.calculations(PROBLEM, completion, None, partial=0.5)
    assert got["reward"] == pytest.approx(reward)


@pytest.mark.parametrize("number", ["1e999999999", "-2.5E999999999", "9" * 10_000])
def test_numbers_of_the_prompt_are_not_written_out(number: str) -> None:
    """Neither the memory nor the largest number of digits that Python reads is reached."""
    got = verify.calculations(f"What is {number} and 4?", "<<4+4=8>>", None)
    assert got == {"reward": 1.0, "right": 1.0, "written": 1.0}


def test_gsm8k_references_calculate(real_data: Path) -> None:
    """Theirs are right but for a few of another form; most use the numbers of the question."""
    lines = (real_data / "gsm8k" / "test-660.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = [verify.calculations(r["question"], r["answer"], r["answer"]) for r in records]
    assert sum(f["right"] for f in found) / len(found) > 0.97
    assert sum(f["reward"] for f in found) / len(found) > 0.85


def test_imports_neither_jax_nor_sympy() -> None:
    """Workers load this; sympy comes with `math` only."""
    code = (
        "import sys, alignjax.rewards.pool; from alignjax.rewards import verify, format;"
        "bad = {'jax', 'flax', 'sympy', 'math_verify', 'torch'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
