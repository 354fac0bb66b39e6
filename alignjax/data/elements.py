"""Comparisons -> token ids: a prompt once, and its completions; laid out in one sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.data.comparisons import Comparison
from alignjax.data.encode import TextOptions, chat_template
from alignjax.text.chat import encode_chat, encode_prompt, encode_prompt_completion


@dataclass(frozen=True)
class Element:
    """A comparison as token ids."""

    prompt: np.ndarray
    """[P] int32, P at least 1."""
    completions: tuple[np.ndarray, ...]
    """[C] int32 each, what ends them (EOS, the end of a turn) included."""
    ranks: tuple[int, ...]
    """One for each completion: 1 the best."""
    margin: float = 0.0
    label: bool | None = None
    index: int = -1
    """Its place in the source."""

    def num_tokens(self, *, shared_prompt: bool) -> int:
        """Tokens that it takes in a row."""
        total = sum(len(completion) for completion in self.completions)
        if shared_prompt:
            return len(self.prompt) - 1 + len(self.completions) + total
        return len(self.prompt) * len(self.completions) + total

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt) + max(len(completion) for completion in self.completions)


def comparison_encoder(
    config: TextOptions, tokenizer: Tokenizer
) -> Callable[[Comparison], Element]:
    """A function from a comparison to its ids.

    Prompt and completion are encoded as for SFT, once for each completion; messages always go
    through the chat template. What a template writes after the end of the last turn is left out, so
    that the last token is the one that generation stops at.
    """
    template = functools.cache(lambda: chat_template(config, tokenizer))
    system = [] if config.system is None else [{"role": "system", "content": config.system}]

    def ids_and_mask(prompt: Any, response: str) -> tuple[list[int], list[bool]]:
        if isinstance(prompt, str):
            if not config.chat:
                if not prompt.strip() and not encode_prompt(
                    tokenizer, prompt, add_bos=config.add_bos
                ):
                    raise UserError(
                        "the prompt has no tokens, so nothing predicts the first one of a "
                        "response; write one, or set add_bos with a tokenizer that has BOS"
                    )
                return encode_prompt_completion(
                    tokenizer, prompt, response, add_bos=config.add_bos, add_eos=config.add_eos
                )
            prompt = [*system, {"role": "user", "content": prompt}]
        messages = [*prompt, {"role": "assistant", "content": response}]
        return encode_chat(
            tokenizer, template(), messages, train_on="last", **config.template_variables
        )

    def encode(comparison: Comparison) -> Element:
        prompts, completions = [], []
        for number, response in enumerate(comparison.responses):
            ids, mask = ids_and_mask(comparison.prompt, response)
            start = mask.index(True) if True in mask else len(ids)
            stop = start + sum(mask)
            if start == stop:
                raise UserError(f"response {number + 1} has no tokens: nothing to train on")
            prompts.append(ids[:start])
            completions.append(np.array(ids[start:stop], np.int32))
            if prompts[number] != prompts[0]:
                raise UserError(
                    f"response {number + 1}: the ids of the prompt are others than before response "
                    "1: the chat template, or the tokenizer, reads it otherwise depending on what "
                    "follows; take another chat_template, or end the prompt where a token ends"
                )
        return Element(
            prompt=np.array(prompts[0], np.int32),
            completions=tuple(completions),
            ranks=comparison.ranks,
            margin=comparison.margin,
            label=comparison.label,
        )

    return encode


def lay_out(element: Element, *, shared_prompt: bool) -> dict[str, np.ndarray]:
    """The tokens of an element, in one sequence.

    Returns:
      [length] arrays: `tokens` (int32); `mask` (bool; True on completions); `positions` (int32; of
      each branch as if it stood alone); `branches` (int32; k = 1.. on what belongs to completion k
      alone; with `shared_prompt` 0 on the prompt, of which each branch repeats the last token, so
      that it predicts the first one of the completion).
    """
    prompt, num = element.prompt, len(element.prompt)
    shared = num - 1 if shared_prompt else 0
    parts = [(prompt[:shared], 0, shared, 0)]  # Tokens, first position, of them prompt, branch.
    for k, completion in enumerate(element.completions, start=1):
        parts.append((np.concatenate([prompt[shared:], completion]), shared, num - shared, k))
    counts = [np.arange(len(tokens), dtype=np.int32) for tokens, *_ in parts]
    return {
        "tokens": np.concatenate([tokens for tokens, *_ in parts]).astype(np.int32),
        "mask": np.concatenate([n >= own for n, (_, _, own, _) in zip(counts, parts, strict=True)]),
        "positions": np.concatenate(
            [n + first for n, (_, first, _, _) in zip(counts, parts, strict=True)]
        ),
        "branches": np.concatenate(
            [np.full(len(tokens), k, np.int32) for tokens, _, _, k in parts]
        ),
    }


def mismatched(elements: Sequence[Element], has_room: Callable[[Element], bool]) -> list[Element]:
    """Elements of one completion, each with a second one: that of the next element of another
    prompt, in a circle.

    Where there is none, or the two have no room, an element stays as it is. Both have rank 1, so
    that they are never compared.
    Source: arXiv:2402.01306 sec. 4 (KTO).
    """
    out = []
    for i, element in enumerate(elements):
        others = [*elements[i + 1 :], *elements[:i]]
        other = next((x for x in others if not np.array_equal(x.prompt, element.prompt)), None)
        if other is not None:
            both = (element.completions[0], other.completions[0])
            second = replace(element, completions=both, ranks=(1, 1))
            element = second if has_room(second) else element
        out.append(element)
    return out
