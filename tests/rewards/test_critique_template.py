"""What a model reads before it writes a critique and a revision, word by word."""

import pytest

from alignjax.core.errors import UserError
from alignjax.rewards.constitution import Principle
from alignjax.rewards.critique_template import CritiqueTemplate, load_critique_template

PRINCIPLE = Principle(name="p", critique="rude?", revision="be kind", comparison="kinder?")
CHAT = CritiqueTemplate(
    chat=True, critique="Q {{ principle.critique }}", revision="R {{ principle.revision }}"
)
PROMPT = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


def said(messages):
    return [(message["role"], message["content"]) for message in messages]


def test_turns_of_a_chat():
    before = [("system", "s"), ("user", "hi"), ("assistant", "go away"), ("user", "Q rude?")]
    assert said(CHAT.for_critique(PRINCIPLE, PROMPT, "go away")) == before
    assert said(CHAT.for_revision(PRINCIPLE, PROMPT, "go away", "yes, rude")) == [
        *before, ("assistant", "yes, rude"), ("user", "R be kind"),
    ]  # fmt: skip
    without = CHAT.model_copy(update={"critique": None})
    assert said(without.for_revision(PRINCIPLE, PROMPT, "go away", None)) == [
        ("system", "s"), ("user", "hi"), ("assistant", "go away"), ("user", "R be kind"),
    ]  # fmt: skip
    assert said(PROMPT) == [("system", "s"), ("user", "hi")], "what was given stays as it was"


def test_text_with_control_tokens():
    template = load_critique_template("critique_text")
    assert template.for_critique(PRINCIPLE, "ask:", " no") == "ask: no<critique> rude?:"
    assert template.for_revision(PRINCIPLE, "ask:", " no", " bad") == (
        "ask: no<critique> rude?: bad<revision>"
    )


def test_texts_are_data():
    """Whatever an answer holds stands there as it is: it is neither rendered nor escaped."""
    answer = "{{ 7 * 7 }} {% raw %} <b>&amp;"
    template = load_critique_template("critique_text")
    assert answer in template.for_critique(PRINCIPLE, answer, answer)
    odd = PRINCIPLE.model_copy(update={"critique": "{{ prompt }}"})
    assert said(CHAT.for_critique(odd, PROMPT, answer))[2:] == [
        ("assistant", answer), ("user", "Q {{ prompt }}"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["critique_chat", "revision_chat", "critique_text"])
def test_those_that_ship(name):
    template = load_critique_template(name)
    assert template.chat == name.endswith("chat")
    assert (template.critique is None) == (name == "revision_chat")
    prompt = PROMPT if template.chat else "hi"
    critique = None if template.critique is None else "bad"
    found = str(template.for_revision(PRINCIPLE, prompt, "no", critique))
    assert ("be kind" in found) == template.chat
    assert ("rude?" in found) == ("bad" in found) == (template.critique is not None)


def test_faults(tmp_path):
    path = tmp_path / "mine.yaml"

    def load(critique, revision="r"):
        path.write_text(f"chat: false\ncritique: {critique!r}\nrevision: {revision!r}\n")
        return load_critique_template(str(path))

    with pytest.raises(UserError, match=r"mine\.yaml:2: critique: line 1"):
        load("{{ principle.critique")
    with pytest.raises(UserError, match=r"critique template: critique: UndefinedError.*'promt'"):
        load("{{ promt }}").for_critique(PRINCIPLE, "p", "r")
    with pytest.raises(UserError, match=r"revision: UndefinedError.*'critique' is undefined"):
        load("", "{{ critique }}").for_revision(PRINCIPLE, "p", "r", None)
    with pytest.raises(UserError, match="'__class__'"):
        load("{{ prompt.__class__ }}").for_critique(PRINCIPLE, "p", "r")
    with pytest.raises(UserError, match="critique_chat"):
        load_critique_template("critique_cha")
