"""Where an answer is looked for, and which one counts."""

import re

import pytest

from alignjax.rewards.answers import find_answer, find_number, visible


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("q", "a<think>b</think>c", "ac"),
        ("q", "<think>b</think>c<think>d</think>e", "ce"),
        ("q", "a<think>never closed <answer>1</answer>", "a"),
        ("q <think>\n", "thought</think>c", "c"),
        ("q <think>", "thought, cut off: 7", ""),
        ("q", "opened elsewhere</think>c", "c"),
        ("q", "<think>a<think>b</think>c</think>d", "d"),
    ],
)
def test_thinking_is_not_visible(prompt: str, completion: str, expected: str) -> None:
    assert visible(prompt, completion) == expected


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("<answer> 5 </answer>", "answer_tag", "5"),
        ("<answer>5</answer><answer>6</answer>", "answer_tag", "6"),  # the last one counts
        ("<answer>5</answer><answer></answer>", "answer_tag", None),  # even if it is empty
        ("<answer>5</answer><answer>6", "answer_tag", "5"),  # unless it is not closed
        ("<answer>5<answer>6</answer>", "answer_tag", "6"),
        ("5", "answer_tag", None),
        ("<answer>a\nb</answer>", "answer_tag", "a\nb"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", "boxed", r"\{1,2\}"),
        (r"\boxed{3} \boxed{4", "boxed", "3"),
        (r"\boxed{\boxed{3}}", "boxed", r"\boxed{3}"),
        (r"\boxed{}", "boxed", None),
        (r"{ \boxed{ {1} \boxed {2} { \boxed{3} }", "boxed", "3"),
        (r"} \boxed{1} }", "boxed", "1"),
        (r"\boxed{1\}2\\}", "boxed", r"1\}2\\"),
        (r"\\boxed{1} \\\boxed{2} \\\\boxed{3}", "boxed", "3"),
        (r"\boxedin{1}", "boxed", None),
        ("#### 1\nso\n#### 1,200 \nbye", "hashes", "1,200"),
        ("####", "hashes", None),
        ("from 3 to 12-4", "last_number", "4"),
        ("it is -4.5.", "last_number", "-4.5"),
        ("1,234,567 in all", "last_number", "1,234,567"),
        ("none", "last_number", None),
        ("  x y ", "all", "x y"),
        ("", "all", None),
        ("A: 1 A: 2", r"regex:A: (\d)", "2"),
        ("abc", r"regex:[ab]", "b"),
        ("abc", r"regex:(x)|c", None),
    ],
)
def test_place(text: str, place: str, expected: str | None) -> None:
    assert find_answer(text, place) == expected


@pytest.mark.parametrize("num", [1, 16_384, 500_000])
def test_repeats_do_not_take_long(num: int) -> None:
    """Half a million: hours if each opening were followed to the end of the text."""
    assert find_answer("\\boxed{" * num, "boxed") is None
    assert find_answer("\\boxed{" * num + "7}", "boxed") == "7"
    assert find_answer("\\boxed{7}" + "\\boxed{" * num, "boxed") == "7"
    nested = "\\boxed{" * num + "7" + "}" * num
    assert find_answer(nested, "boxed") == nested[len("\\boxed{") : -1]
    assert find_answer("\\" * 2 * num + "\\boxed{7}", "boxed") == "7"
    assert visible("q", "a" + "<think>" * num) == "a"
    assert visible("q", "<think>" * num + "b</think>a" + "<think>" * num) == "a"
    assert visible("q", "</think>" * num + "a") == "a"
    assert find_answer("<answer>" * num, "answer_tag") is None
    assert find_answer("<answer>" * num + "7</answer>" * num, "answer_tag") == "7"


def test_unknown_place() -> None:
    with pytest.raises(ValueError, match="place='box'; expected one of answer_tag, boxed"):
        find_answer("x", "box")
    with pytest.raises(re.error):
        find_answer("x", "regex:(")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", 72.0),
        ("072 clips", 72.0),
        ("$1,200.50", 1200.5),
        ("-3", -3.0),
        ("\N{MINUS SIGN}3", -3.0),
        ("+.5", 0.5),
        ("2e-3", 0.002),
        ("50%", 50.0),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        ("3/0", None),
        ("70 or 72", None),
        ("1,0000", None),
        ("1 1/2", None),
        ("nan", None),
        ("inf", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_number(text: str, expected: float | None) -> None:
    assert find_number(text) == expected
