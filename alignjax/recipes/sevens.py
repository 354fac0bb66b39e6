"""A seed -> rankings of strings of digits by a hidden rule: more sevens, fewer nines are better.

    {"prompt": "04+21=", "responses": ["772", "98", "10"], "ranks": [1, 3, 2]}

Small enough to learn in seconds, and of known truth: a reward model is right if it agrees with
`score`. Responses of one score are ties. Chance comes from `random.Random.random`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from alignjax.data import Preference, write_preferences
from alignjax.text import vocab_tokenizer

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
DIGITS = "0123456789"
TOKENS = (BOS, EOS, PAD, *DIGITS, "+", "=")


def score(response: str) -> int:
    """The hidden reward."""
    return response.count("7") - response.count("9")


def compare(prompt: str, first: str, second: str, **fields: Any) -> float:
    """A judge: 0.3 above or below 1/2 as the hidden reward has it, and 0.1 more for what stands
    first, which asking in both orders cancels."""
    better = (score(first) > score(second)) - (score(first) < score(second))
    return 0.6 + 0.3 * better


def write(
    out_dir: Path,
    *,
    seed: int,
    num_train: int = 400,
    num_test: int = 100,
    max_responses: int = 4,
    max_digits: int = 8,
) -> None:
    """Writes train.jsonl and test.jsonl, records of preferences, and tokenizer/.

    Args:
      out_dir: must exist.
      seed: of both files; no prompt is in both.
      num_train, num_test: records.
      max_responses: of a prompt, which has at least two.
      max_digits: in a response, which has at least one.
    """
    chance = random.Random(seed)
    seen: set[str] = set()
    for name, num in (("train", num_train), ("test", num_test)):
        found = []
        while len(found) < num:
            prompt = f"{_number(chance, 4)}+{_number(chance, 4)}="
            responses = _responses(chance, max_responses, max_digits)
            scores = [score(response) for response in responses]
            if prompt in seen or len(set(scores)) == 1:
                continue
            seen.add(prompt)
            order = sorted(set(scores), reverse=True)
            ranks = [1 + order.index(one) for one in scores]
            found.append(Preference(prompt, responses, ranks=ranks))
        write_preferences(out_dir / f"{name}.jsonl", found)
    vocab_tokenizer(TOKENS, bos=BOS, eos=EOS, pad=PAD).save(str(out_dir / "tokenizer"))


def _responses(chance: random.Random, most: int, max_digits: int) -> list[str]:
    num = 2 + int(chance.random() * (most - 1))
    found: dict[str, None] = {}  # In the order of drawing.
    while len(found) < num:
        found[_number(chance, max_digits)] = None
    return list(found)


def _number(chance: random.Random, max_digits: int) -> str:
    length = 1 + int(chance.random() * max_digits)
    return "".join(DIGITS[int(10 * chance.random())] for _ in range(length))
