"""Comparisons -> ids: those that SFT trains and generation sees, up to what ends a turn."""

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import Comparison, Element, TextOptions, comparison_encoder
from alignjax.data.elements import mismatched
from alignjax.recipes import chains
from alignjax.text import ChatTemplate, encode_chat_prompt, encode_prompt, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    chains.write(folder, seed=0, num_questions=24, num_drills=8, num_train=8, num_test=4)
    return load_tokenizer(str(folder / "tokenizer"))


def encoded(tokenizer, prompt, responses, ranks=None, **options):
    ranks = tuple(range(1, len(responses) + 1)) if ranks is None else ranks
    comparison = Comparison(prompt, responses, ranks, 0.5, True)
    return comparison_encoder(TextOptions(**options), tokenizer)(comparison)


def test_plain_text(tokenizer):
    found = encoded(tokenizer, "1+2=", ["3", "12"], ranks=(2, 1))
    assert found.prompt.tolist() == encode_prompt(tokenizer, "1+2=")
    assert found.prompt[0] == tokenizer.bos_id
    for completion, text in zip(found.completions, ("3", "12"), strict=True):
        assert completion[-1] == tokenizer.eos_id and completion.dtype == np.int32
        assert tokenizer.decode(completion[:-1]) == text
    assert (found.ranks, found.margin, found.label) == ((2, 1), 0.5, True)
    found = encoded(tokenizer, "1+2=", ["3"], add_bos=False, add_eos=False)
    assert found.prompt[0] != tokenizer.bos_id and found.completions[0][-1] != tokenizer.eos_id


def test_an_empty_prompt(tokenizer):
    assert encoded(tokenizer, "", ["3", "4"]).prompt.tolist() == [tokenizer.bos_id]
    with pytest.raises(UserError, match="the prompt has no tokens"):
        encoded(tokenizer, "", ["3", "4"], add_bos=False)


TEMPLATE = (
    "{% for m in messages %}{{ '+' if m.role == 'user' else '-' }}{{ m.content }}{{ eos_token }} "
    "{% endfor %}{% if add_generation_prompt %}-{% endif %}"
)


def test_a_system_message_goes_first(tokenizer, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    found = encoded(tokenizer, "1", ["2"], chat=True, system="9", chat_template=str(path))
    assert tokenizer.decode(found.prompt, skip_special=False) == "9<eos>1<eos>"


@pytest.fixture
def template(tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    return str(tmp_path / "t.jinja")


def test_chat_ends_with_the_end_of_the_turn(tokenizer, template):
    """Not with the space that the template writes after it."""
    messages = [{"role": "user", "content": "1"}]
    found = encoded(tokenizer, messages, ["2", "34"], chat_template=template)
    rendered = encode_chat_prompt(tokenizer, ChatTemplate(tokenizer, TEMPLATE), messages)
    assert found.prompt.tolist() == rendered
    spoken = [tokenizer.decode(c[:-1]) for c in found.completions]
    assert spoken == ["2", "34"]
    assert all(c[-1] == tokenizer.eos_id for c in found.completions)
    by_text = encoded(tokenizer, "1", ["2", "34"], chat=True, chat_template=template)
    np.testing.assert_array_equal(by_text.prompt, found.prompt)
    assert tokenizer.decode(found.prompt, skip_special=False) == "+1<eos> -"


def test_prompts_that_differ_are_refused(tokenizer, monkeypatch):
    from alignjax.data import elements

    def encode(tokenizer, prompt, response, **options):
        ids = [1, 5 + len(response), 3]
        return ids, [False, False, True]

    monkeypatch.setattr(elements, "encode_prompt_completion", encode)
    with pytest.raises(UserError, match="response 2: the ids of the prompt are others than before"):
        encoded(tokenizer, "x", ["2", "33"])
    assert encoded(tokenizer, "x", ["2", "3"]).completions[0].tolist() == [3]


def single(prompt, completion):
    return Element(np.array(prompt), (np.array(completion),), (1,))


def test_for_kto_each_has_the_completion_of_the_next_in_a_circle():
    found = mismatched([single([n], [100 + n]) for n in range(4)], lambda element: True)
    for n, element in enumerate(found):
        assert element.prompt.tolist() == [n] and element.ranks == (1, 1)
        assert [c.tolist() for c in element.completions] == [[100 + n], [100 + (n + 1) % 4]]


def test_for_kto_the_next_is_of_another_prompt_and_has_room():
    # Prompts 0 0 1 1; completion 3 leaves no room for another.
    given = [single([n // 2], [100 + n] * (13 if n == 3 else 2)) for n in range(4)]
    found = mismatched(given, lambda element: element.num_tokens(shared_prompt=True) <= 16)
    assert [e.completions[1].tolist() for e in found[:3]] == [[102] * 2, [102] * 2, [100] * 2]
    assert found[3] is given[3]


def test_for_kto_nothing_is_mismatched_among_those_of_one_prompt():
    given = [single([1], [n]) for n in range(3)]
    assert mismatched(given, lambda element: True) == given
