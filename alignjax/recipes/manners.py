"""A seed -> a world of manners: people ask about two things and would like a good answer.

    ann asks about tea and rain:
     hello ann, tea is warm and rain is very wet as people say thanks

What makes an answer good is known (`score`), but the phases only see rankings of answers: it is a
hidden reward, by which a reward model, and what is trained on rankings, can be judged. An answer
should be polite, free of digits, short, and right. The corpus has all of that by chance, each apart
from the others (`Draw.response`), so that a policy is told by the rankings what people like, not
how to write it.

In YAML the hidden reward is a reward function:

    functions: {hidden: {function: alignjax.recipes.manners.hidden}}
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.recipes.chance import Chance
from alignjax.text import vocab_tokenizer

BOS, EOS = "<bos>", "<eos>"
NAMES = ("ann", "bob", "cy", "dee", "eli", "fay", "gus", "hal")
FACTS = {
    "tea": "warm", "rain": "wet", "ice": "cold", "sun": "bright", "sky": "blue", "grass": "green",
    "coal": "black", "snow": "white", "honey": "sweet", "lemon": "sour", "rock": "hard",
    "wool": "soft",
}  # fmt: skip
GREETINGS = ("hello", "welcome", "greetings")
OPENERS = ("well", "now", "so")
RUDE = ("fool", "oaf", "clown")
MODIFIERS = ("quite", "very", "rather")
DIGITS = tuple("0123456789")
FILLERS = ("as people say", "you know well", "in my view", "more or less", "to be plain")
_WORDS = (
    *NAMES, *FACTS, *FACTS.values(), *GREETINGS, *OPENERS, *RUDE, *MODIFIERS, *DIGITS, "thanks",
    "asks", "about", "is", "and", *(word for filler in FILLERS for word in filler.split()),
)  # fmt: skip
TOKENS = (BOS, EOS, ",", ":", *dict.fromkeys(f" {word}" for word in _WORDS), *NAMES)
"""The vocabulary, for longest-match tokenisation; names also begin a prompt."""

TEST_SHARE = 4
"""One prompt in so many is held out."""


class Question(NamedTuple):
    """Who asks, about which two things."""

    name: str
    topics: tuple[str, str]

    @property
    def prompt(self) -> str:
        return f"{self.name} asks about {self.topics[0]} and {self.topics[1]}:"

    @property
    def is_held_out(self) -> bool:
        """By the prompt's own text, so that no seed moves it to the other side."""
        return zlib.crc32(self.prompt.encode()) % TEST_SHARE == 0


QUESTIONS = tuple(
    Question(name, (first, second))
    for name in NAMES for first in FACTS for second in FACTS if first != second
)  # fmt: skip


def score(prompt: str, completion: str) -> dict[str, float]:
    """What an answer is worth, by its parts, in points; 3 at best for what the corpus holds.

    polite: 1 if the first word is a greeting, -1 if it is a rude one. right: 0.5 for each of the
    two things asked about that is said to be what it is (and not to be anything else). digits: -0.5
    for each. short: 1 up to 10 words, 0.1 less for each further one.
    """
    words = completion.replace(",", " ").split()
    first = words[0] if words else ""
    asked = [word for word in prompt.replace(":", " ").split() if word in FACTS]
    return {
        "polite": float(first in GREETINGS) - float(first in RUDE),
        "right": 0.5 * sum(_said(words, topic) == {FACTS[topic]} for topic in asked),
        "digits": 0.0 - 0.5 * sum(word in DIGITS for word in words),
        "short": 1.0 - 0.1 * max(0, len(words) - 10) if words else 0.0,
    }


def hidden(prompt: str, completion: str, **fields: Any) -> dict[str, float]:
    """The same as a reward function: their sum is the reward."""
    return score(prompt, completion)


def _said(words: list[str], topic: str) -> set[str]:
    """What a text says of a topic: `topic is [modifier or digit] attribute`."""
    found = set()
    for i, word in enumerate(words):
        if word == topic and words[i + 1 : i + 2] == ["is"]:
            rest = [w for w in words[i + 2 : i + 4] if w not in (*MODIFIERS, *DIGITS)]
            found |= set(rest[:1])
    return found


class Draw(Chance):
    """A stream of chance, and the answers that are drawn from it."""

    def response(self, question: Question) -> str:
        """Polite, rude or neither, a third each; each fact wrong 20%, before it a digit 30%, a
        modifier 30%; none to four fillers; thanks or not."""
        opening = self.choice((GREETINGS, RUDE, OPENERS))
        facts = " and ".join(self.fact(topic) for topic in question.topics)
        words = [f"{self.choice(opening)} {question.name},", facts]
        words += [self.choice(FILLERS) for _ in range(self.integer(0, 4))]
        words += ["thanks"] if self.chance(0.5) else []
        return " " + " ".join(words)

    def fact(self, topic: str) -> str:
        attribute = FACTS[topic]
        if self.chance(0.2):
            attribute = self.choice([other for other in FACTS.values() if other != attribute])
        before = self.choice((DIGITS,) * 3 + (MODIFIERS,) * 3 + ((),) * 4)
        return " ".join([topic, "is", *([self.choice(before)] if before else []), attribute])


def write(out_dir: str | Path, *, seed: int, num_lines: int = 40_000) -> None:
    """Writes corpus.jsonl ({"prompt", "completion"}), train.jsonl and test.jsonl ({"prompt"}), and
    tokenizer/.

    The corpus asks nothing that is held out; train and test are all prompts of either side, in
    random order.

    Args:
      out_dir: created if need be; the files are overwritten.
      seed: the only source of chance.
      num_lines: of the corpus.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    draw = Draw(f"{seed}/corpus")
    train = [question for question in QUESTIONS if not question.is_held_out]
    asked = (draw.choice(train) for _ in range(num_lines))
    write_records(
        out_dir / "corpus.jsonl",
        ({"prompt": q.prompt, "completion": draw.response(q)} for q in asked),
    )
    test = [question for question in QUESTIONS if question.is_held_out]
    for split, questions in (("train", train), ("test", test)):
        shuffled = Draw(f"{seed}/{split}").shuffled(questions)
        write_records(out_dir / f"{split}.jsonl", ({"prompt": q.prompt} for q in shuffled))
    vocab_tokenizer(TOKENS, bos=BOS, eos=EOS, pad=EOS).save(str(out_dir / "tokenizer"))


def write_records(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Writes a JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
