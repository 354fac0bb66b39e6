"""A YAML file of principles -> a `Constitution`, and the principles that a record draws from it.

A principle says what an answer should be like, in three forms: what a critic is asked, what who
revises is asked, and what a judge of two answers is asked (arXiv:2212.08073). Which principles a
record gets is a function of its key alone, so that a run that is continued draws the same ones.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from alignjax.core.config import Config, build
from alignjax.core.errors import KeyedError, UserError
from alignjax.core.yaml_tree import load

FOLDER = Path(__file__).parent / "constitutions"
"""Those that ship with the package, each found by its name."""
Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
Request = Annotated[str, Field(pattern=r"\S")]


class Principle(Config):
    """What an answer should be like."""

    name: Name
    critique: Request
    """Asks how an answer falls short of it."""
    revision: Request
    """Asks to write the answer anew, so that it no longer does."""
    comparison: Request
    """Asks which of two answers is nearer to it."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How likely it is to be drawn, relative to the others."""
    tags: list[Name] = []


class Constitution(Config):
    """Principles, each under a name of its own."""

    name: Name
    principles: list[Principle] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_unlike_names(self) -> Self:
        seen: dict[str, int] = {}
        for i, principle in enumerate(self.principles):
            if principle.name in seen:
                raise KeyedError(
                    ("principles", i, "name"),
                    f"{principle.name!r} is the name of principle {seen[principle.name] + 1} "
                    "already; records name a principle by it, so give this one another",
                )
            seen[principle.name] = i
        return self

    def __getitem__(self, name: str) -> Principle:
        """The principle of that name. Raises KeyError if there is none."""
        return {principle.name: principle for principle in self.principles}[name]

    def ordered(self, key: str) -> list[Principle]:
        """All principles, in an order drawn at random, without replacement.

        Each place goes to one of those that are left, in proportion to their weights. The others'
        order stays when a principle is taken out of the constitution.

        Args:
          key: what the order depends on, such as a seed and the number of a record.
        Source: exponential clocks, the logarithm of Efraimidis and Spirakis 2006, algorithm A.
        """
        return sorted(self.principles, key=lambda p: -math.log(_uniform(key, p.name)) / p.weight)


def _uniform(key: str, name: str) -> float:
    """In (0, 1), 2^-53 the smallest, the same on every machine."""
    drawn = hashlib.sha256(f"{key}\0{name}".encode()).digest()
    return ((int.from_bytes(drawn[:8], "big") >> 12) + 0.5) / 2**52


class ConstitutionConfig(Config):
    """Which constitution, and which of its principles."""

    path: str = "helpful_honest_harmless"
    """A YAML file, or the name of one that ships with the package."""
    tags: list[str] = []
    """Only the principles that have one of these; empty: all."""
    leave_out: list[str] = []
    """Names of principles to do without."""

    def open(self) -> Constitution:
        """Reads it, and takes what is asked for.

        Raises:
          UserError: if there is no such file, it is no constitution, it has no such tag or
            principle, or none is left.
        """
        whole = load_constitution(self.path)
        names = [principle.name for principle in whole.principles]
        tags = sorted({tag for principle in whole.principles for tag in principle.tags})
        _check_known("tags", self.tags, tags, whole)
        _check_known("leave_out", self.leave_out, names, whole)
        kept = [
            p
            for p in whole.principles
            if p.name not in self.leave_out and (not self.tags or {*self.tags} & {*p.tags})
        ]
        if not kept:
            raise UserError(
                f"constitution: of the {len(names)} principles of {whole.name!r} none is left; "
                "leave fewer out (leave_out), or name more tags"
            )
        return whole.model_copy(update={"principles": kept})


def load_constitution(path: str) -> Constitution:
    """Reads a YAML file, or one that ships with the package.

    Args:
      path: of the file, or the name of a shipped one, such as helpful_honest_harmless.
    Raises:
      UserError: naming the file and, of a fault in it, the line.
    """
    return build(Constitution, load(shipped(path, FOLDER, "constitution")))


def shipped(path: str, folder: Path, what: str) -> Path:
    """A file that is there, or the one of that name in a folder of the package.

    Args:
      what: what to call it in the error.
    Raises:
      UserError: if there is neither; it names what ships.
    """
    here = Path(path).expanduser()
    if here.is_file():
        return here
    known = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if path not in known:
        close = difflib.get_close_matches(path, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"the package has {', '.join(known)}"
        raise UserError(f"{path}: no such file, and no {what} of that name ships; {hint}")
    return known[path]


def _check_known(key: str, given: list[str], known: list[str], of: Constitution) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'none'}"
            )
            raise UserError(f"constitution.{key}: {of.name!r} has no {name!r}; {hint}")
