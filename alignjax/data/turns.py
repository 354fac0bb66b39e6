"""Conversations -> one example for each turn of the assistant, which ends there."""

from __future__ import annotations

import dataclasses

import numpy as np

from alignjax.core.errors import UserError
from alignjax.data.schema import Example
from alignjax.data.sources import Source
from alignjax.text.chat import turns


class Turns:
    """A source with an example for each turn of the assistant: the conversation up to there.

    So each is trained as the model sees it then, whatever a template does to earlier turns; and a
    position in the data stays one number. Examples without messages are as they were.
    """

    def __init__(self, source: Source):
        """Counts the turns of all examples.

        Args:
          source: of `Example`, as `Examples` is.
        Raises:
          UserError: on a conversation in which the assistant says nothing.
        """
        self._source = source
        places: list[tuple[int, int]] = []  # Example, messages of it.
        for index in range(len(source)):
            messages = source[index].messages
            if messages is None:
                places.append((index, -1))
                continue
            try:
                places += [(index, turn + 1) for turn in turns(messages)]
            except UserError as error:
                raise UserError(f"{source.where(index)}: {error}") from error
        self._places = np.array(places, np.int32).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        of, end = self._places[index]
        example = self._source[int(of)]
        if example.messages is None:
            return example
        return dataclasses.replace(example, messages=example.messages[:end])

    def where(self, index: int) -> str:
        of, end = self._places[index]
        return self._source.where(int(of)) + ("" if end < 0 else f": messages up to [{end - 1}]")
