"""Configs: what YAML says is what is built, and every fault is told with its place."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from alignjax.core import config as config_module
from alignjax.core.config import (
    Config,
    build,
    check_name,
    describe,
    diff,
    dump,
    find_config,
    load,
    loads,
    to_dict,
)
from alignjax.core.errors import UserError


class Optimizer(Config):
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["adamw", "muon"] = "adamw"


class Sft(Config):
    phase: Literal["sft"]
    epochs: int = 1


class Grpo(Config):
    phase: Literal["grpo"]
    group_size: int = 8

    @field_validator("group_size")
    @classmethod
    def _has_baseline(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"{value} gives no baseline; use at least 2")
        return value


class Run(Config):
    name: str
    steps: int = 3
    is_quiet: bool = False
    limit: float = math.inf
    seed: int | str | None = None
    optimizer: Optimizer
    phases: tuple[Annotated[Sft | Grpo, Field(discriminator="phase")], ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    reference: Optimizer | None = None

    @model_validator(mode="after")
    def _steps_are_few(self) -> "Run":
        if self.steps > 10**6:
            raise ValueError("steps: more than a million")
        return self


GOOD = """\
# a comment
name: first
optimizer:
  learning_rate: 1e-4
phases:
  - phase: sft
  - phase: grpo
    group_size: 4
"""


def complaints(text, *overrides):
    with pytest.raises(UserError) as caught:
        build(Run, loads(text, overrides, name="x.yaml"))
    return str(caught.value).splitlines()


def test_values_and_defaults():
    run = build(Run, loads(GOOD))
    assert run.name == "first" and run.steps == 3 and run.limit == math.inf
    assert run.optimizer == Optimizer(learning_rate=0.0001, betas=(0.9, 0.99), kind="adamw")
    assert run.phases == (Sft(phase="sft", epochs=1), Grpo(phase="grpo", group_size=4))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001), ("1E5", 100000.0), ("1.5e+3", 1500.0), (".5", 0.5), ("5.", 5.0),
        ("-.5", -0.5), ("7", 7), ("-7", -7), ("1_000_000", 1000000), ("010", 10), ("0x1F", 31),
        ("0o17", 15), ("true", True), ("False", False), ("no", "no"), ("on", "on"), ("y", "y"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("e3", "e3"),
        ("~", None), ("null", None), ("", None), (".inf", math.inf), ("-.inf", -math.inf),
        ("'1e-4'", "1e-4"), ("!!str 12", "12"), ("!!float 3", 3.0), ("[1, [a]]", [1, ["a"]]),
        ("{b: 1, 2: x}", {"b": 1, "2": "x"}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    got = loads(f"a: {text}").values["a"]
    assert got == value and type(got) is type(value)


def test_nan_is_a_number():
    assert math.isnan(loads("a: .nan").values["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: key 'a' was given in line 1"),
        ("s:\n  a: 1\n  a: 3", "x.yaml:3: key 's.a' was given in line 2"),
        ("a: &one 1\nb: *one", "x.yaml:2: not valid YAML: aliases (*name) are not supported"),
        ("- 1", "x.yaml:1: expected lines of `key: value` at the top"),
        ("just text", "x.yaml:1: expected lines of `key: value` at the top"),
        ("a: !!python/object/apply:os.getcwd []", "x.yaml:1: the tag"),
        ("a: !secret x", "x.yaml:1: the tag '!secret' is not supported"),
        ("a: !!int x", "x.yaml:1: 'x' is not of type int"),
        ("b: 1\na: [1", "x.yaml:2: not valid YAML"),
        ("b: 1\n\ta: 1", "x.yaml:2: not valid YAML: while scanning for the next token found"),
        ("a: 1\nb: \x07", "x.yaml:2: not valid YAML: character U+0007 is not allowed"),
        ("a: 1\n---\nb: 2", "x.yaml:2: not valid YAML: expected a single document"),
        ("? [1]\n: 2", "x.yaml:1: a key must be text"),
    ],
)
def test_faults_of_yaml_name_the_line(text, message):
    with pytest.raises(UserError) as caught:
        loads(text, name="x.yaml")
    assert str(caught.value).startswith(message)


def test_empty_file_is_an_empty_section():
    assert loads("").values == loads("# nothing\n").values == {}
    assert complaints("") == [
        "x.yaml: missing key 'name'",
        "x.yaml: missing key 'optimizer'",
    ]


def test_files(tmp_path):
    path = tmp_path / "a run.yaml"
    path.write_text(GOOD)
    assert build(Run, load(path, ["steps=5"])).steps == 5
    assert load(str(path)).origin(("name",)) == (str(path), 2)
    with pytest.raises(UserError, match=r"missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)
    path.write_bytes(b"name: \xff")
    with pytest.raises(UserError, match="not UTF-8 text: byte 6"):
        load(path)


def test_all_faults_of_a_file_are_told_at_once():
    text = """\
name: 7
steps: 3.5
is_quiet: yes
seed: [1]
stepz: 4
optimizer:
  lerning_rate: 1e-4
  betas: [1, "2"]
  kind: adam
phases:
  - phase: grpo
    group_size: 1
  - phase: dpo
  - phase: sft
    epochs: null
  - epochs: 2
  - 3
weights: 3
"""
    assert complaints(text) == [
        "x.yaml:1: name: expected text, got 7",
        "x.yaml:2: steps: expected a whole number, got 3.5",
        "x.yaml:3: is_quiet: expected true or false, got the text 'yes'",
        "x.yaml:4: seed: expected a whole number or text, got a list of 1",
        "x.yaml:5: unknown key 'stepz'; did you mean 'steps'?",
        "x.yaml:6: missing key 'learning_rate' in optimizer",
        "x.yaml:7: unknown key 'lerning_rate' in optimizer; did you mean 'learning_rate'?",
        "x.yaml:8: optimizer.betas.1: expected a number, got the text '2'",
        "x.yaml:9: optimizer.kind: expected 'adamw' or 'muon', got the text 'adam'; "
        "did you mean 'adamw'?",
        "x.yaml:12: phases.0.group_size: 1 gives no baseline; use at least 2",
        "x.yaml:13: phases.1.phase: expected 'sft' or 'grpo', got the text 'dpo'",
        "x.yaml:15: phases.2.epochs: expected a whole number, got null",
        "x.yaml:16: missing key 'phase' in phases.3",
        "x.yaml:17: phases.4: expected a section of `key: value`, got 3",
        "x.yaml:18: weights: expected a section of `key: value`, got 3",
    ]


def test_limits_and_rules_of_the_schema():
    assert complaints(GOOD.replace("1e-4", "-1")) == [
        "x.yaml:4: optimizer.learning_rate: expected a number greater than 0, got -1"
    ]
    assert complaints(GOOD, "steps=2_000_000") == ["x.yaml: steps: more than a million"]
    assert complaints(GOOD, "optimizer.betas=[1]", "name={}") == [
        "command line: optimizer.betas: expected more values, got a list of 1",
        "command line: name: expected text, got a section",
    ]
    assert complaints(GOOD, "optimizer.betas=[1, 2, 3]") == [
        "command line: optimizer.betas: expected at most 2 items, got a list of 3"
    ]
    # A section that may be left out is still checked where it is given.
    assert complaints(GOOD + "reference:\n  learning_rate: a\n") == [
        "x.yaml:10: reference.learning_rate: expected a number, got the text 'a'"
    ]


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one():
    lines = complaints(GOOD, "learning_rate=1", "optimizer.steps=1", "optimizer.zzz=1")
    assert sorted(lines) == [
        "command line: unknown key 'learning_rate'; did you mean 'optimizer.learning_rate' or "
        "'reference.learning_rate'?",
        "command line: unknown key 'steps' in optimizer; did you mean 'steps' at the top level?",
        "command line: unknown key 'zzz' in optimizer; expected one of learning_rate, betas, kind",
    ]
    assert complaints(GOOD, "phases.0.epoch=1") == [
        "command line: unknown key 'epoch' in phases.0; did you mean 'epochs'?"
    ]


def test_overrides():
    tree = loads(
        GOOD,
        [
            "optimizer.learning_rate=1e-3", "optimizer.learning_rate=2e-3", "steps=0x10",
            "optimizer.betas=[0.5, .25]", "phases.1.group_size=16", "weights={a: 1, b: 2}",
            "weights.b=3", "reference.learning_rate=1", "name='a: b'", "seed=", "limit=.inf",
        ],
    )  # fmt: skip
    run = build(Run, tree)
    assert run.optimizer.learning_rate == 0.002 and run.steps == 16
    assert run.optimizer.betas == (0.5, 0.25) and run.phases[1].group_size == 16
    assert run.weights == {"a": 1.0, "b": 3.0} and run.reference.learning_rate == 1.0
    assert run.name == "a: b" and run.seed is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "command line: 'steps' is not an override; write key=value"),
        (".a=1", "command line: '.a=1' is not an override"),
        ("a.=1", "command line: 'a.=1' is not an override"),
        ("name.b=1", "command line: 'name.b=1': name is 'first' (x.yaml:2), not a section"),
        ("phases.7.epochs=1", "command line: 'phases.7.epochs=1': phases is a list of 2"),
        ("a=[1", "command line: not valid YAML: while parsing a flow sequence"),
        ("a=: :", "command line: not valid YAML"),
    ],
)
def test_what_is_not_an_override(override, message):
    with pytest.raises(UserError) as caught:
        loads(GOOD, [override], name="x.yaml")
    assert str(caught.value).startswith(message)


def test_description_tells_each_value_and_its_place():
    tree = loads(GOOD, ["optimizer.betas=[0.5, 1]", "weights.a=1"], name="x.yaml")
    lines = [" ".join(line.split()) for line in describe(build(Run, tree), tree).splitlines()]
    assert lines == [
        "name: first # x.yaml:2",
        "steps: 3 # default",
        "is_quiet: false # default",
        "limit: .inf # default",
        "seed: null # default",
        "optimizer:",
        "learning_rate: 0.0001 # x.yaml:4",
        "betas: [0.5, 1.0] # command line",
        "kind: adamw # default",
        "phases:",
        "- phase: sft # x.yaml:6",
        "epochs: 1 # default",
        "- phase: grpo # x.yaml:7",
        "group_size: 4 # x.yaml:8",
        "weights:",
        "a: 1.0 # command line",
        "reference: null # default",
    ]


def test_what_an_override_replaces_is_forgotten():
    text = GOOD + "reference:\n  learning_rate: 1\n  kind: muon\n"
    tree = loads(text, ["reference={learning_rate: 2}"], name="x.yaml")
    described = describe(build(Run, tree), tree)
    reference = [" ".join(line.split()) for line in described.splitlines()[-3:]]
    assert reference == [
        "learning_rate: 2.0 # command line",
        "betas: [0.9, 0.99] # default",
        "kind: adamw # default",
    ]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    name=texts | st.sampled_from(["yes", "null", "1e5", "- a", "a: b", "#", "é", "\x85", "1_0"]),
    limit=st.floats(allow_nan=False),
    weights=st.dictionaries(texts, st.floats(allow_nan=False), max_size=3),
)  # fmt: skip
def test_description_is_yaml_that_builds_the_same_config(name, limit, weights):
    optimizer = Optimizer(learning_rate=1e-30)
    run = Run(name=name, limit=limit, weights=weights, optimizer=optimizer,
              phases=(Sft(phase="sft"), Grpo(phase="grpo")))  # fmt: skip
    text = describe(run, loads(""))
    assert build(Run, loads(text)) == run
    # Other readers, most of them of YAML 1.1, see the same.
    assert yaml.safe_load(text) == to_dict(run)


texts_of_yaml = st.sampled_from(["1e-4", "0o7", "no", "~", "2020-01-01", "1_0", "<<", "=", ""])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text() | texts_of_yaml,
        st.recursive(
            leaves | st.text() | texts_of_yaml,
            lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        ),
        max_size=5,
    )
)
def test_what_is_dumped_is_read_back(values):
    """By us, and by readers of YAML 1.1."""
    text = dump(values)
    assert loads(text).values == values
    assert yaml.safe_load(text) == values


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0"])
def test_names_of_directories(name):
    with pytest.raises(ValueError, match="names no directory of its own"):
        check_name(name)
    assert check_name("a.b c-1") == "a.b c-1"


def test_diff():
    run = to_dict(build(Run, loads(GOOD)))
    other = to_dict(build(Run, loads(GOOD, ["optimizer.learning_rate=2e-3", "weights.a=1",
                                            "phases.1.group_size=2"])))  # fmt: skip
    assert diff(run, other) == [
        "optimizer.learning_rate: 0.0001 -> 0.002",
        "phases.1.group_size: 4 -> 2",
        "weights: {} -> (not set)",
        "weights.a: (not set) -> 1.0",
    ]
    assert diff(run, run) == []
    assert diff({"a": math.nan, "b": 1}, {"a": math.nan, "b": 1}) == []


def test_configs_are_frozen_strict_and_closed():
    run = build(Run, loads(GOOD))
    with pytest.raises(ValidationError, match="frozen"):
        run.steps = 4
    with pytest.raises(ValidationError, match="valid number"):
        Optimizer(learning_rate="0.1")
    with pytest.raises(ValidationError, match="Extra inputs"):
        Optimizer(learning_rate=0.1, lr=0.1)


def test_find_config(tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    for name in ("smoke/sft.yaml", "smoke/grpo.yaml", "recipes/grpo.yaml", "recipes/r1_zero.yaml"):
        (configs / name).parent.mkdir(parents=True, exist_ok=True)
        (configs / name).write_text("")
    package = tmp_path / "alignjax" / "core" / "config.py"
    monkeypatch.setattr(config_module, "__file__", str(package))
    monkeypatch.chdir(configs / "smoke")
    assert find_config("sft.yaml") == Path("sft.yaml")
    assert find_config("smoke/sft") == configs / "smoke/sft.yaml"
    assert find_config("configs/smoke/sft.yaml") == configs / "smoke/sft.yaml"
    assert find_config("r1_zero") == configs / "recipes/r1_zero.yaml"
    with pytest.raises(UserError, match="did you mean recipes/r1_zero"):
        find_config("recipes/r1_zer")
    with pytest.raises(UserError, match="no such config file"):
        find_config("grpo")  # two of that name
