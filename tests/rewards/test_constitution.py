"""A file of principles, what it has to be, and which principles a record draws from it."""

from collections import Counter

import pytest

from alignjax.core.config import build, loads, to_dict
from alignjax.core.digest import of_value
from alignjax.core.errors import UserError
from alignjax.rewards.constitution import (
    Constitution,
    ConstitutionConfig,
    load_constitution,
)

TEXT = """\
name: small
principles:
  - {name: a, critique: ca, revision: ra, comparison: xa, weight: 3.0, tags: [one]}
  - {name: b, critique: cb, revision: rb, comparison: xb, tags: [one, two]}
  - {name: c, critique: cc, revision: rc, comparison: xc, tags: [two]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def digest(constitution):
    return of_value(to_dict(constitution))


def names(principles):
    return [principle.name for principle in principles]


def test_the_one_that_ships_is_found_by_name():
    found = load_constitution("helpful_honest_harmless")
    assert 12 <= len(found.principles) <= 16
    assert {t for p in found.principles for t in p.tags} == {"helpful", "honest", "harmless"}
    # A comparison asks for the better answer, so that its words make sense without the others.
    assert all(p.comparison.startswith("Which answer") for p in found.principles)
    assert all(p.comparison.endswith("?") for p in found.principles)


def test_the_digest_is_of_what_it_says(file):
    first = digest(load_constitution(str(file)))
    assert len(first) == 64
    file.write_text("# a comment\n" + TEXT.replace("weight: 3.0", "weight:   3.0"))
    assert digest(load_constitution(str(file))) == first
    file.write_text(TEXT.replace("cb", "cB"))
    assert digest(load_constitution(str(file))) != first


def test_an_order_is_one_of_all_principles_and_a_function_of_the_key(file):
    found = load_constitution(str(file))
    for number in range(20):
        order = names(found.ordered(f"0/{number}"))
        assert sorted(order) == ["a", "b", "c"], "without replacement"
        assert order == names(found.ordered(f"0/{number}"))
    assert len({tuple(names(found.ordered(str(i)))) for i in range(200)}) == 6


def test_draws_are_in_proportion_to_the_weights(file):
    found = load_constitution(str(file))
    orders = [tuple(names(found.ordered(f"7/{i}"))) for i in range(4000)]
    # Standard error 0.008. First a with 3/5; then, without it, b and c alike: of all orders that
    # begin with b, 1/5, the second is a with 3/4.
    first = Counter(order[0] for order in orders)
    assert first["a"] / 4000 == pytest.approx(3 / 5, abs=0.03)
    assert first["b"] / 4000 == pytest.approx(1 / 5, abs=0.03)
    second = Counter(order[1] for order in orders if order[0] == "b")
    assert second["a"] / first["b"] == pytest.approx(3 / 4, abs=0.06)


def test_taking_one_out_leaves_the_order_of_the_others(file):
    whole = ConstitutionConfig(path=str(file)).open()
    part = ConstitutionConfig(path=str(file), leave_out=["a"]).open()
    assert names(part.principles) == ["b", "c"] and digest(part) != digest(whole)
    for i in range(50):
        order = [name for name in names(whole.ordered(str(i))) if name != "a"]
        assert names(part.ordered(str(i))) == order


def test_tags(file):
    def tagged(*tags):
        return names(ConstitutionConfig(path=str(file), tags=[*tags]).open().principles)

    assert tagged() == tagged("one", "two") == ["a", "b", "c"]
    assert tagged("two") == ["b", "c"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: c,", "name: b,", r"small\.yaml:5: principles\.2\.name: 'b' is the name of princi"),
        ("critique: cb", "critique: ''", r"small\.yaml:4: principles\.1\.critique: expected"),
        ("critique: cb, ", "", r"small\.yaml:4: missing key 'critique'"),
        ("weight: 3.0", "weight: 0", r"small\.yaml:3: principles\.0\.weight: expected a number"),
        ("weight: 3.0", "wieght: 3.0", r"small\.yaml:3: unknown key 'wieght'.*mean 'weight'"),
        ("name: b", "name: b c", r"small\.yaml:4: principles\.1\.name: expected"),
        ("tags: [two]", "tags: two", r"small\.yaml:5: principles\.2\.tags: expected a list"),
        (TEXT.partition("\n")[2], "principles: []", r"small\.yaml:2: principles: expected"),
    ],
)
def test_faults_are_told_with_their_line(file, old, new, message):
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_constitution(str(file))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "helpful_honest"}, "no constitution of that name.*'helpful_honest_harmless'"),
        ({"path": "none.yaml"}, "the package has helpful_honest_harmless"),
        ({"leave_out": ["trutful"]}, "has no 'trutful'; did you mean 'truthful'"),
        ({"tags": ["kind"]}, "has no 'kind'; it has harmless, helpful, honest"),
        ({"tags": ["honest"], "leave_out": ["truthful", "says_what_it_does_not_know",
          "honest_about_itself", "no_manipulation"]}, "none is left"),
    ],
)  # fmt: skip
def test_what_cannot_be_had(values, message):
    with pytest.raises(UserError, match=message):
        ConstitutionConfig(**values).open()


def test_a_name_twice_is_a_fault_of_python_objects_too():
    with pytest.raises(UserError, match="already"):
        build(Constitution, loads(TEXT.replace("name: b", "name: a")))
