"""Files of prompts and responses -> tasks to rank, every record checked before anybody sees one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignjax.core.errors import UserError
from alignjax.data import Example, Fields, Source, open_source
from alignjax.data.schema import make_example
from alignjax.rewards.plain import to_json

JUDGEMENTS = ("ranks", "choices", "labels", "scores", "annotator", "time", "comment", "flagged")
"""Keys that an export writes anew or would contradict: not taken from what is read."""
_SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Task:
    """A prompt and what may answer it."""

    prompt: str | list[dict[str, Any]]
    """Text, or messages {"role", "content"}."""
    responses: tuple[str, ...]
    """At least two, all different, none blank."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Further keys of the record, which the export keeps; JSON values."""

    def to_json(self) -> str:
        return json.dumps(
            {"prompt": self.prompt, "responses": self.responses, "fields": self.fields},
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Task:
        record = json.loads(text)
        return cls(record["prompt"], tuple(record["responses"]), record["fields"])


def digest(tasks: Sequence[Task]) -> str:
    """SHA-256, hexadecimal, of all tasks in order."""
    found = hashlib.sha256()
    for task in tasks:
        found.update(task.to_json().encode() + b"\n")
    return found.hexdigest()


def read_prompts(path: str) -> tuple[list[Example], Source]:
    """Examples with `prompt` or `messages`, from a file of such records; and where each stands.

    Raises:
      UserError: naming file and line of a record without a prompt.
    """
    source = open_source(path)
    examples = []
    for i in range(len(source)):
        record = source[i]
        try:
            examples.append(_prompt(record))
            _check_text(record)
        except UserError as error:
            raise UserError(f"{source.where(i)}: {error}") from error
    return examples, source


def read_tasks(responses: str, prompts: str | None = None) -> list[Task]:
    """Tasks of a file with prompts and responses, or of one file for each.

    Args:
      responses: file of records with `responses` (a list of texts) and, without `prompts`, with
        `prompt` (text or messages) or `messages`. Any kind that `data.open_source` opens.
      prompts: file of records with `prompt` or `messages`, one for each record of `responses`, in
        the same order.
    Raises:
      UserError: naming file and line of the records with no prompt, with fewer than two responses,
        an empty one or two that are equal; or if the files do not belong together.
    """
    source = open_source(responses)
    given = None
    if prompts is not None:
        given, _ = read_prompts(prompts)
        if len(given) != len(source):
            raise UserError(
                f"{prompts} has {len(given)} records, {responses} has {len(source)}; "
                "expected one record of responses for each prompt, in the same order"
            )
    tasks, faults = [], []
    for i in range(len(source)):
        try:
            tasks.append(_task(source[i], None if given is None else given[i]))
        except UserError as error:
            faults.append(f"{source.where(i)}: {error}")
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = faults[:_SHOWN_FAULTS] + ([f"and {more} more records"] if more > 0 else [])
        raise UserError("\n".join(shown))
    return tasks


def _task(record: dict[str, Any], given: Example | None) -> Task:
    has_prompt = "prompt" in record or "messages" in record
    if given is None and not has_prompt:
        raise UserError(
            f"no prompt; expected a field 'prompt' or 'messages' (fields there: {_names(record)}), "
            "or the prompts in a file of their own: --prompts FILE"
        )
    example = _prompt(record) if has_prompt else given
    prompt = _text(example)
    if given is not None and prompt != _text(given):
        raise UserError("its prompt is not the one that --prompts has in this place")
    fields = (given.fields if given is not None else {}) | record
    read = ("prompt", "messages", "responses", *JUDGEMENTS)
    fields = {key: value for key, value in fields.items() if key not in read}
    _check_responses(record)
    _check_text(record)
    return Task(prompt, tuple(record["responses"]), json.loads(to_json(fields)))


def _prompt(record: dict[str, Any]) -> Example:
    if "prompt" in record and "messages" in record:
        raise UserError("both 'prompt' and 'messages'; expected one of them")
    if "prompt" not in record and "messages" not in record:
        raise UserError(
            f"no prompt; expected a field 'prompt' or 'messages' (fields there: {_names(record)})"
        )
    key = "messages" if "messages" in record else "prompt"
    is_text = isinstance(record[key], str)
    if is_text and not record[key].strip():
        raise UserError(f"field {key!r}: expected text or messages, came an empty text")
    fields = Fields(prompt=key) if is_text else Fields(messages=key)
    try:
        return make_example(record, fields, lambda: "")
    except UserError as error:
        raise UserError(str(error).removeprefix(": ")) from error


def _text(example: Example) -> Any:
    return example.prompt if example.messages is None else example.messages


def _check_responses(record: dict[str, Any]) -> None:
    responses = record.get("responses")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        came = "no such field" if "responses" not in record else repr(responses)[:60]
        raise UserError(f"field 'responses': expected a list of texts, came {came}")
    if len(responses) < 2:
        raise UserError(f"{len(responses)} response; ranking takes at least 2")
    for i, response in enumerate(responses):
        if not response.strip():
            raise UserError(f"response {i + 1} of {len(responses)} is empty; leave it out")
    text, count = Counter(responses).most_common(1)[0]
    if count > 1:
        first = responses.index(text)
        second = responses.index(text, first + 1)
        raise UserError(
            f"responses {first + 1} and {second + 1} are equal ({text[:40]!r}); leave one out"
        )


def _check_text(record: dict[str, Any]) -> None:
    for text in _strings(record):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"half a character (a surrogate) at position {error.start + 1} of {text[:40]!r}"
            ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"
