"""An answer on its way through critiques and revisions -> a record to read, and one for SFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignjax.core.types import Sample
from alignjax.data import Example
from alignjax.phases.responses import demonstration
from alignjax.rewards.constitution import Principle
from alignjax.rewards.critique_template import Prompt
from alignjax.rewards.plain import to_json


@dataclass
class Chain:
    """An answer on its way through the rounds."""

    example: Example
    prompt: Prompt
    principles: list[Principle]
    """In the order in which rounds take them."""
    first: Sample
    fault: str | None
    """Why the first answer is not gone on with, if it is not."""
    answer: str = ""
    """As it stands after the rounds so far."""
    num_tokens: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_revised(self) -> bool:
        """Whether any round came to its end, also one that left the answer as it was."""
        return any(round["fault"] is None for round in self.rounds)


_OWN = ("prompt", "response", "num_tokens", "fault", "rounds", "revision", "revision_num_tokens")


def trace_record(chain: Chain) -> dict[str, Any]:
    """All that came of an answer; `revision` is None if nothing revised it."""
    example = chain.example
    named = {"reference": example.reference, "tools": example.tools}
    given = {name: value for name, value in named.items() if value is not None}
    own = {
        "prompt": chain.prompt,
        "response": chain.first.completion,
        "num_tokens": chain.first.num_tokens,
        "fault": chain.fault,
        "rounds": chain.rounds,
        "revision": chain.answer if chain.is_revised else None,
        "revision_num_tokens": chain.num_tokens if chain.is_revised else None,
    }
    fields = {k: v for k, v in {**example.fields, **given}.items() if k not in _OWN}
    return own | json.loads(to_json(fields))


def sft_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt and the last revision, as `phase: sft` reads them, with the record's fields."""
    found = demonstration(record["prompt"], record["revision"])
    return found | {k: v for k, v in record.items() if k not in _OWN and k not in found}
