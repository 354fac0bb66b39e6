"""Transcripts of hh-rlhf, "\\n\\nHuman: ... \\n\\nAssistant: ...", <-> `Preference`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data.comparisons import ranked_pairs
from alignjax.data.native import common_length, made, noted, taken
from alignjax.data.preferences import Preference
from alignjax.data.schema import kind
from alignjax.data.sources import Record

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def from_hh(record: Record, *, as_text: bool = False) -> Preference:
    """chosen, rejected: transcripts, which are the same up to the last turn of the assistant.

    Args:
      as_text: the prompt is the transcript up to there; otherwise the messages that it spells.
    """
    (before, chosen), (other, rejected) = (
        _split(text, name)
        for text, name in zip(taken(record, "chosen", "rejected"), ("chosen", "rejected"),
                              strict=True)
    )  # fmt: skip
    if before != other:
        raise UserError(
            f"chosen and rejected are not the same up to their last {ASSISTANT.strip()} (they part "
            f"at character {common_length(before, other) + 1}); take the record out"
        )
    prompt: Any = before + ASSISTANT
    if not as_text:
        prompt = _turns(before)
        chosen, rejected = chosen.removeprefix(" "), rejected.removeprefix(" ")
    responses = [chosen, rejected]
    return made(record, ("chosen", "rejected"), prompt=prompt, responses=responses, ranks=[1, 2])


def to_hh(preference: Preference) -> list[Record]:
    """Transcripts of each two responses of unlike rank."""
    prompt, space = preference.prompt, ""
    if not isinstance(prompt, str):
        prompt, space = _transcript(prompt) + ASSISTANT, " "
    elif not (prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT)):
        raise UserError(f"prompt: no transcript from {HUMAN!r} to {ASSISTANT!r}")
    return [
        {"chosen": prompt + space + a, "rejected": prompt + space + b} | noted(preference)
        for a, b in ranked_pairs(preference)
    ]


def _split(transcript: Any, name: str) -> tuple[str, str]:
    """What stands before the last turn of the assistant, and what it says."""
    if not isinstance(transcript, str):
        raise UserError(f"{name}: expected text, came {kind(transcript)}")
    before, found, reply = transcript.rpartition(ASSISTANT)
    if not found or not before.startswith(HUMAN) or HUMAN in reply:
        raise UserError(
            f"{name}: expected a transcript {HUMAN!r} ... {ASSISTANT!r} ..., the last turn the "
            f"assistant's, came {kind(transcript)}"
        )
    return before, reply


def _turns(transcript: str) -> list[dict[str, Any]]:
    parts = re.split(f"({HUMAN}|{ASSISTANT})", transcript)[1:]
    roles = {HUMAN: "user", ASSISTANT: "assistant"}
    return [
        {"role": roles[name], "content": text.removeprefix(" ")}
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _transcript(messages: Iterable[dict[str, Any]]) -> str:
    names = {"user": HUMAN, "assistant": ASSISTANT}
    text = ""
    for message in messages:
        if message["role"] not in names or set(message) != {"role", "content"}:
            raise UserError(
                f"prompt: a transcript holds text of user and assistant, not {kind(message)}"
            )
        text += f"{names[message['role']]} {message['content']}"
    return text


def is_transcript(record: Record) -> bool:
    """Whether chosen and rejected look like transcripts."""
    both = (record.get("chosen"), record.get("rejected"))
    return all(isinstance(text, str) and text.startswith(HUMAN) for text in both)
