"""A YAML file of jinja texts -> what a model reads before it writes a critique or a revision.

For a chat model the texts are turns of the user, after the answer and after the critique. For a
model of plain text they are all that it reads, from the prompt on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jinja2
from pydantic import model_validator

from alignjax.core.config import Config, build, to_dict
from alignjax.core.errors import KeyedError, UserError
from alignjax.core.yaml_tree import load
from alignjax.rewards.constitution import Principle, shipped
from alignjax.text.sandbox import Sandbox

FOLDER = Path(__file__).parent / "templates"
"""Those that ship with the package: critique_chat, revision_chat and critique_text."""
Message = dict[str, Any]
Prompt = str | Sequence[Mapping[str, Any]]
"""Text to go on from, or messages that the assistant is to go on with."""
NAMES = ("critique", "revision")


class CritiqueTemplate(Config):
    """Texts over `principle` (`name`, `critique`, `revision`, `comparison`), `prompt`, `response`
    and, of the revision, `critique`; with chat `prompt` is the list of messages."""

    chat: bool
    """True: turns of a chat, which its chat template wraps. False: the whole text."""
    critique: str | None
    """What asks for a critique; null: none is written, and the answer is revised at once."""
    revision: str
    """What asks for a revision."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        for name in NAMES:
            if (source := getattr(self, name)) is not None:
                try:
                    Sandbox().from_string(source)
                except jinja2.TemplateSyntaxError as error:
                    raise KeyedError((name,), f"line {error.lineno}: {error.message}") from None
        return self

    def for_critique(self, principle: Principle, prompt: Prompt, response: str) -> Prompt:
        """What is read before the critique. Raises UserError if a text cannot be rendered."""
        assert self.critique is not None
        asked = self._render("critique", principle=principle, prompt=prompt, response=response)
        return [*_answered(prompt, response), _user(asked)] if self.chat else asked

    def for_revision(
        self, principle: Principle, prompt: Prompt, response: str, critique: str | None
    ) -> Prompt:
        """What is read before the revision; `critique` is None where none is asked for."""
        given = {} if critique is None else {"critique": critique}
        asked = self._render(
            "revision", principle=principle, prompt=prompt, response=response, **given
        )
        if not self.chat:
            return asked
        if critique is None:
            return [*_answered(prompt, response), _user(asked)]
        before = self.for_critique(principle, prompt, response)
        assert not isinstance(before, str)
        return [*before, _assistant(critique), _user(asked)]

    def _render(self, name: str, *, principle: Principle, **values: Any) -> str:
        sandbox = Sandbox()
        # What is undefined, such as a name with a slip in it, would be rendered as nothing.
        sandbox.undefined = jinja2.StrictUndefined
        sandbox.start()
        try:
            template = sandbox.from_string(getattr(self, name))
            return template.render(principle=to_dict(principle), **values)
        except Exception as error:  # A template is a program, with all that can go wrong in one.
            raise UserError(
                f"critique template: {name}: {type(error).__name__}: {error}"
            ) from error


def load_critique_template(path: str) -> CritiqueTemplate:
    """Reads a YAML file, or one that ships with the package.

    Args:
      path: of the file, or the name of a shipped one, such as critique_chat.
    Raises:
      UserError: naming the file and, of a fault in it, the line.
    """
    return build(CritiqueTemplate, load(shipped(path, FOLDER, "template")))


def _answered(prompt: Prompt, response: str) -> list[Message]:
    assert not isinstance(prompt, str)
    return [*map(dict, prompt), _assistant(response)]


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
