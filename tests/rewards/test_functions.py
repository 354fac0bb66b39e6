"""Paths to functions, their options, what they return."""

import sys
from pathlib import Path

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.rewards import format as shape
from alignjax.rewards import verify
from alignjax.rewards.functions import bind, describe, load, named_parts

SOURCE = """
def quality(prompt, completion, reference):
    return 0.5

def _hidden(): ...
limit = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "broken_rewards.py").write_text("import no_such_package")
    (tmp_path / "failing_rewards.py").write_text("x = 1\nx / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_rewards", "broken_rewards", "failing_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_built_ins() -> None:
    assert load("verify.exact") is verify.exact
    assert load("verify.math") is verify.math
    assert load("format.tags") is shape.tags
    assert load("alignjax.rewards.format:length") is shape.length


@pytest.mark.parametrize(
    "path", ["my_rewards.quality", "my_rewards:quality", "my_rewards.py:quality"]
)
def test_the_users_own(here: Path, path: str) -> None:
    assert load(path)("p", "c", "r") == 0.5
    assert load(f"{here}/my_rewards.py:quality")("p", "c", "r") == 0.5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("verify.maths", "it has calculations, exact, math, numeric. Did you mean 'math'?"),
        ("my_rewards:qualty", "it has quality. Did you mean 'quality'?"),
        ("my_rewards:limit", "no function 'limit'"),
        ("my_reward:quality", "there is no module 'my_reward', looked for as my_reward in the "),
        ("my_rewards.deep:quality", "there is no module 'my_rewards.deep'"),
        ("mine.py:quality", "there is no file .*mine.py"),
        ("quality", "expected a built-in such as verify.exact"),
        ("broken_rewards:f", "No module named 'no_such_package'"),
        ("failing_rewards:f", "ZeroDivisionError: division by zero .line 2 of failing_rewards.py"),
    ],
)
def test_bad_paths_say_what_was_looked_for(here: Path, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert f"reward function {path!r}" in str(caught.value)


VALUES = {"prompt": "p", "completion": "c", "reference": "r", "num_tokens": 3, "color": "red"}


def test_a_function_gets_what_it_names() -> None:
    assert bind(lambda completion, color: completion + color, {}, "f")(VALUES) == "cred"
    assert bind(lambda prompt, **fields: (prompt, fields["color"]), {}, "f")(VALUES) == ("p", "red")
    assert bind(lambda completion, color="blue": color, {}, "f")(VALUES) == "red"


def test_options_come_from_the_config_only() -> None:
    def reward(completion, *, color="blue", **fields):
        return color, "color" in fields

    assert bind(reward, {}, "f")(VALUES) == ("blue", False)
    assert bind(reward, {"color": "green"}, "f")(VALUES) == ("green", False)


def test_misspelt_option() -> None:
    with pytest.raises(UserError, match=r"'verify.exact' has no argument 'plcae'.*mean 'place'"):
        bind(verify.exact, {"plcae": "boxed"}, "verify.exact")
    with pytest.raises(UserError, match=r"no argument 'patern'.*mean 'pattern'"):
        bind(shape.matches, {"pattern": "a", "patern": "b"}, "format.matches")


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("format.length", {}, "argument 'max_tokens': it is missing; set it in args"),
        ("format.length", {"max_tokens": "10"}, "'max_tokens': expected a whole number, came '10'"),
        ("format.length", {"max_tokens": 9, "slack": 0.5}, "'slack': expected a whole number"),
        ("format.matches", {}, "argument 'pattern': it is missing"),
        ("format.matches", {"pattern": "("}, r"'pattern': '\(': missing \)"),
        ("format.tags", {"tags": "think"}, "'tags': expected a list of texts, came 'think'"),
        ("format.tags", {"may_be_empty": "think"}, "'may_be_empty': expected a list of texts"),
        ("verify.exact", {"required_tags": "answer"}, "'required_tags': expected a list of texts"),
        ("verify.exact", {"required_tags": [1]}, "'required_tags': expected a list of texts"),
        ("verify.exact", {"ignore_case": "no"}, "'ignore_case': expected true or false"),
        ("verify.exact", {"place": "box"}, "'place': 'box': .*expected one of answer_tag"),
        ("verify.math", {"place": 1}, "'place': expected text, came 1"),
        ("verify.math", {"reference_place": "regex:("}, "'reference_place': 'regex:.': missing"),
        ("verify.numeric", {"rtol": "1e-3"}, "'rtol': expected a number, came '1e-3'"),
    ],
)
def test_options_of_built_ins_are_checked_at_load(path: str, args: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"reward function {path!r}, .*{message}"):
        bind(load(path), args, path)


def test_every_option_of_a_built_in_can_be_checked() -> None:
    for path in ("exact", "math", "numeric", "calculations"):
        bind(load(f"verify.{path}"), {}, path)
    args = {"min_tokens": 1, "max_tokens": 2, "slack": 1}
    assert bind(load("format.length"), args, "f")(VALUES | {"max_tokens": 9}) == 0.0
    for args in ({"place": "all", "required_tags": []}, {"ignore_case": True}):
        bind(verify.exact, args, "f")
    bind(verify.numeric, {"atol": 0, "rtol": 1e-3}, "f")
    bind(verify.calculations, {"partial": 0.5}, "f")


def test_options_of_the_users_own_are_their_business() -> None:
    def reward(completion, *, color, tags=()):
        return color, tags

    assert bind(reward, {"tags": "think"}, "f")(VALUES) == ("red", "think")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (1, {"": 1.0}),
        (True, {"": 1.0}),
        (-0.25, {"": -0.25}),
        (np.float32(0.5), {"": 0.5}),
        (np.bool_(True), {"": 1.0}),
        (np.array(2), {"": 2.0}),
        ({"a": 1, "b": np.float64(0.5)}, {"": 1.5, "a": 1.0, "b": 0.5}),
        ({"a": 1, "reward": 0.25}, {"": 0.25, "a": 1.0}),
    ],
)
def test_results(result: object, expected: dict[str, float]) -> None:
    assert named_parts(result) == expected


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "it returned NoneType; expected a number"),
        ("1.0", "it returned str; expected a number"),
        ([1.0], "it returned list"),
        (np.ones(1), "it returned ndarray"),
        (1j, "it returned complex"),
        (float("nan"), "it returned nan; expected a finite number"),
        (np.float32("-inf"), "it returned -inf"),
        (10**400, "it returned inf"),
        ({}, "an empty dict"),
        ({"a": 1, "b": "x"}, "it returned str at 'b'"),
        ({"reward": 1, "b": float("nan")}, "it returned nan at 'b'"),
    ],
)
def test_what_is_no_reward(result: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        named_parts(result)


def test_description_of_an_error_is_one_short_line() -> None:
    try:
        raise KeyError("a\nb" + "x" * 1000)
    except KeyError as error:
        text = describe(error)
    assert text.startswith("KeyError: ") and "\n" not in text
    assert len(text) < 360 and "of test_functions.py)" in text
