"""Columns of TRL's trainers (pairs, with the prompt or within them; labels) <-> `Preference`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data.comparisons import labelled, ranked_pairs
from alignjax.data.native import common_length, made, noted, taken
from alignjax.data.preferences import Preference
from alignjax.data.schema import check_messages, kind
from alignjax.data.sources import Record


def from_pairs(record: Record) -> Preference:
    """prompt, chosen, rejected: each text, or each messages."""
    prompt, chosen, rejected = taken(record, "prompt", "chosen", "rejected")
    responses = [_reply(chosen, "chosen"), _reply(rejected, "rejected")]
    return made(record, ("chosen", "rejected"), prompt=prompt, responses=responses, ranks=[1, 2])


def to_pairs(preference: Preference) -> list[Record]:
    """A record for each two responses of unlike rank."""
    prompt, say = preference.prompt, _says(preference)
    return [
        {"prompt": prompt, "chosen": say(a), "rejected": say(b)} | noted(preference)
        for a, b in ranked_pairs(preference)
    ]


def from_implicit(record: Record) -> Preference:
    """chosen, rejected: conversations or texts that begin with the prompt, the same in both.

    Of texts the prompt is what both begin with, up to the end of a word.
    """
    chosen, rejected = taken(record, "chosen", "rejected")
    prompt: Any
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _common_prompt(chosen, rejected)
        responses = [chosen[len(prompt) :], rejected[len(prompt) :]]
    else:
        check_messages(chosen, "chosen")
        check_messages(rejected, "rejected")
        prompt = chosen[:-1]
        if not prompt or prompt != rejected[:-1]:
            raise UserError(
                "chosen and rejected are not the same up to their last message, so they answer no "
                "common prompt; give the prompt as a field of its own, or take the record out"
            )
        responses = [_reply(chosen[-1:], "chosen"), _reply(rejected[-1:], "rejected")]
    return made(record, ("chosen", "rejected"), prompt=prompt, responses=responses, ranks=[1, 2])


def to_implicit(preference: Preference) -> list[Record]:
    """A record for each two responses of unlike rank, each after the prompt."""
    prompt, say = preference.prompt, _says(preference)
    return [
        {"chosen": prompt + say(a), "rejected": prompt + say(b)} | noted(preference)
        for a, b in ranked_pairs(preference)
    ]


def from_unpaired(record: Record) -> Preference:
    """prompt, completion: each text, or each messages; label: true or false."""
    prompt, completion, label = taken(record, "prompt", "completion", "label")
    responses = [_reply(completion, "completion")]
    return made(record, ("completion", "label"), prompt=prompt, responses=responses, labels=[label])


def to_unpaired(preference: Preference) -> list[Record]:
    """A record for each response of which it is said whether it is good."""
    prompt, say = preference.prompt, _says(preference)
    return [
        {"prompt": prompt, "completion": say(text), "label": label} | noted(preference)
        for text, label in labelled(preference)
    ]


def from_demonstration(record: Record) -> Preference:
    """prompt, completion: each text, or each messages. It shows how it is done: it is good."""
    prompt, completion = taken(record, "prompt", "completion")
    responses = [_reply(completion, "completion")]
    return made(record, ("completion",), prompt=prompt, responses=responses, labels=[True])


def to_demonstration(preference: Preference) -> list[Record]:
    """A record for each response that is good."""
    prompt, say = preference.prompt, _says(preference)
    return [
        {"prompt": prompt, "completion": say(text)} | noted(preference)
        for text, is_good in labelled(preference)
        if is_good
    ]


def _common_prompt(a: str, b: str) -> str:
    """What both begin with, without the space or the part of a word that it ends in."""
    common = a[: common_length(a, b)]
    ahead = [text[len(common) : len(common) + 1] for text in (a, b)]
    if not all(char.isspace() for char in ahead):
        common = re.sub(r"\S*\Z", "", common)
    return common.rstrip()


def _reply(value: Any, name: str) -> str:
    """A response that is text, or one message of the assistant."""
    if isinstance(value, str):
        return value
    check_messages(value, name)
    if len(value) != 1 or value[0]["role"] != "assistant":
        roles = " ".join(message["role"] for message in value)
        raise UserError(
            f"{name}: expected text or one message of the assistant, came messages of {roles}; "
            'where they begin with the prompt, the layout is "implicit"'
        )
    if not isinstance(value[0].get("content"), str):
        raise UserError(f"{name}: expected a message with text, came {kind(value[0])}")
    return value[0]["content"]


def _says(preference: Preference) -> Callable[[str], Any]:
    """A response as these layouts have it: text after text, a message after messages."""
    if isinstance(preference.prompt, str):
        return lambda text: text
    return lambda text: [{"role": "assistant", "content": text}]
