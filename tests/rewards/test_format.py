"""Tags and lengths."""

import pytest

from alignjax.rewards import format as shape

GOOD = "<think>a</think><answer>b</answer>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, 1.0),
        ("  <think>a\n</think>\n<answer>b</answer>\n", 1.0),
        ("<think></think><answer>b</answer>", 1.0),
        ("<think>a</think><answer> </answer>", 0.0),
        (GOOD + ".", 0.0),
        ("Hm. " + GOOD, 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        (GOOD + "<answer>c</answer>", 0.0),
        ("<think><think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a</answer></think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_tags(completion: str, expected: float) -> None:
    assert shape.tags("q", completion, None) == expected


def test_tags_opened_by_the_prompt() -> None:
    assert shape.tags("q<think>\n", "a</think><answer>b</answer>", None) == 1.0
    assert shape.tags("q<think>", GOOD, None) == 0.0


def test_tags_by_name() -> None:
    completion = "<plan>p</plan><sql>s</sql>"
    assert shape.tags("q", completion, None, tags=["plan", "sql"]) == 1.0
    assert shape.tags("q", completion, None, tags=["sql", "plan"]) == 0.0
    with pytest.raises(ValueError, match="tags is empty"):
        shape.tags("q", completion, None, tags=[])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("so\n#### 72", 1.0), ("so\n#### -7.5", 1.0), ("#### 72 clips", 0.0), ("72", 0.0), ("", 0.0)],
)
def test_matches(completion: str, expected: float) -> None:
    pattern = r"#### -?[0-9][0-9.,]*$"
    assert shape.matches("q", completion, None, pattern=pattern) == expected


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (8, 0.5), (10, 1.0), (20, 1.0), (21, 0.75), (24, 0.0), (99, 0.0)],
)
def test_length(num_tokens: int, expected: float) -> None:
    got = shape.length("q", "c", None, num_tokens, min_tokens=10, max_tokens=20, slack=4)
    assert got == expected
    hard = shape.length("q", "c", None, num_tokens, min_tokens=10, max_tokens=20)
    assert hard == float(expected == 1.0)


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        ("<think>So it is 7.</think><answer>семь</answer>", 1.0),
        ("<think>So это 7</think><answer>7</answer>", 2 / 5),
        ("<think>数 is é</think>", 3 / 4),
        ("<think>数數</think><think>abc</think>", 0.0),
        # No letters, no thought, one that never ends.
        ("<think>1 + 2 = 3</think>", 0.0),
        ("So it is 7", 0.0),
        ("<think>So it is 7", 0.0),
    ],
)
def test_script_is_the_share_of_letters(completion, share):
    assert shape.script("q", completion, None) == pytest.approx(share)
    opened = completion.removeprefix("<think>")
    if opened != completion:
        assert shape.script("q <think>\n", opened, None) == pytest.approx(share)


def test_another_script():
    thought = "<think>So это 數</think><answer>7</answer>"
    for name, num in (("LATIN", 2), ("CYRILLIC", 3), ("CJK", 1), ("HANGUL", 0)):
        assert shape.script("q", thought, None, name=name) == pytest.approx(num / 6)
    assert shape.script("q", "<a>So</a>", None, tag="a") == 1.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>12*03=46;wait:12*03=36;</think>", 1.0),
        ("Wait, that is not right.", 1.0),
        ("WAIT", 1.0),
        ("Let  me\ncheck.", 1.0),
        ("the waiter awaited it", 0.0),
        ("wait_for it", 0.0),
        ("<answer>7</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_reflects(completion: str, expected: float) -> None:
    assert shape.reflects("wait", completion, "wait") == expected


def test_words_of_reflection_are_the_configs() -> None:
    assert shape.reflects("q", "hm, (2+2)", None, words=["hm"]) == 1.0
    assert shape.reflects("q", "wait", None, words=["hm"]) == 0.0
    assert shape.reflects("q", "a+b", None, words=["a.b"]) == 0.0  # A word, not a pattern.
    for words in ([], ["wait", " "]):
        with pytest.raises(ValueError, match="expected at least one, none of them blank"):
            shape.reflects("q", "c", None, words=words)
