"""A template and what is judged -> the text of a question, in which the judged text stays data.

A template is jinja2, rendered in the sandbox of chat templates. It may name

    prompt, first, second | response   what is judged; messages are written out as `ROLE: content`
    question                           what makes a response good, if the config or the caller says
    options, best_score                the verdicts that there are
    cue                                what stands before the verdict; none without chain of thought
    fence                              a line that none of the texts holds
    record                             the fields of the prompt's record, where the caller has them

and any variable that the caller adds. Judged text is fenced and declared to be data. The fence is a
digest of all texts, so that who writes one of them cannot know it, and control tokens that are
spelled out in a text (`<|im_end|>`) are broken apart, so that none of it becomes a turn of its own.
A template that names what is not there is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from alignjax.core.errors import UserError
from alignjax.rewards.judge_config import JudgingConfig
from alignjax.rewards.plain import to_json
from alignjax.text.sandbox import Sandbox

FOLDER = Path(__file__).parent / "templates"
CONTROL = re.compile(
    r"<[|｜][^<>|｜]{1,64}[|｜]>|</?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
)
"""Control tokens as the families of models write them: what an endpoint would take for its own."""

OWN = ("options", "best_score", "cue")


class Template:
    """A compiled template.

    Attributes:
      digest: SHA-256 of its source, hexadecimal.
      name: its name or path.
    """

    def __init__(self, name: str, specials: Sequence[str] = ()):
        """Args:
          name: of one that comes with the package, or a path.
          specials: texts of the special tokens of what answers, as far as they are known.
        Raises:
          UserError: if there is none, or jinja2 does not take it.
        """
        shipped = FOLDER / f"{name}.jinja"
        path = shipped if shipped.is_file() else Path(name)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.jinja")))
            raise UserError(
                f"template: cannot read {name!r} ({error}); expected one of {known}, or the path "
                "of a jinja file"
            ) from error
        self.name, self.digest = name, hashlib.sha256(source.encode()).hexdigest()
        self._specials = sorted({s for s in specials if s.strip()}, key=len, reverse=True)
        self._sandbox = Sandbox()
        self._sandbox.undefined = jinja2.StrictUndefined
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{path}:{error.lineno}: {error.message}") from error

    def render(self, values: Mapping[str, Any]) -> str:
        """The text of a question.

        Args:
          values: JSON values; control tokens in their texts are broken apart here, but for those of
            `OWN`, which the config says.
        Raises:
          UserError: if the template fails on them, or names one that is not there.
        """
        safe = {k: v if k in OWN else self._defused(v) for k, v in values.items()}
        self._sandbox.start()
        try:
            return self._template.render(**safe, fence=fence(self.digest, safe))
        except Exception as error:  # A template is a program, with all that can go wrong in one.
            raise UserError(
                f"template {self.name}: {type(error).__name__}: {error}; there are "
                f"{', '.join([*safe, 'fence'])}"
            ) from error

    def _defused(self, value: Any) -> Any:
        if isinstance(value, str):
            return defused(value, self._specials)
        if isinstance(value, list):
            return [self._defused(one) for one in value]
        if isinstance(value, dict):
            return {self._defused(k): self._defused(one) for k, one in value.items()}
        return value


def load_templates(config: JudgingConfig, specials: Sequence[str]) -> dict[str, Template]:
    """Those of a judge: for `pairwise` and for `pointwise` questions.

    Raises:
      UserError: as `Template`.
    """
    kinds = ("pairwise", "pointwise")
    if config.template != "auto":
        return dict.fromkeys(kinds, Template(config.template, specials))
    ending = "" if config.think is None else "_cot"
    return {kind: Template(kind + ending, specials) for kind in kinds}


def defused(text: str, specials: Sequence[str] = ()) -> str:
    """The text with a space after the first character of each control token in it."""

    def broken(found: re.Match[str]) -> str:
        return f"{found[0][0]} {found[0][1:]}"

    text = CONTROL.sub(broken, text)
    for special in specials:
        text = text.replace(special, f"{special[0]} {special[1:]}" if special[1:] else " ")
    return text


def fence(digest: str, values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that depend on all values, and stand in none."""
    texts = to_json([digest, sorted(values.items())])
    found = ""
    for count in range(100):
        found = hashlib.sha256(f"{count} {texts}".encode()).hexdigest()[:16]
        if found not in texts:
            break
    return found


def shown(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text: of messages the only one's content, or `ROLE: content` of each."""
    if isinstance(prompt, str):
        return prompt
    contents = [(str(m.get("role")), m.get("content")) for m in prompt]
    texts = [(role, c if isinstance(c, str) else json.dumps(c)) for role, c in contents]
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in texts)
