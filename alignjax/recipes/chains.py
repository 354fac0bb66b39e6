"""A seed -> the arithmetic world of the demo: problems and a base corpus of mixed quality.

A problem is a chain of operations, worked from left to right without precedence:

    12*03-09=            start 2..49; + and - take 1..9, * takes 2 or 3; every value is in 0..99
    <think>12*03=36;36-09=27;</think><answer>27</answer>

All numbers have two digits, so every number is two tokens of a 23-token vocabulary (`TOKENS`). The
corpus answers a problem with full working rarely and with a wrong guess mostly; beside that stand
drills, marked by a space, of facts and of problems that are worked. What reinforcement learning can
do here is to elicit and sharpen the working, not to discover arithmetic.

The reward is made of built-ins (in YAML, under `functions`):

    accuracy: {function: verify.exact, weight: 0.9, args: {required_tags: [think, answer]}}
    format:   {function: format.tags, weight: 0.1}
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from alignjax.recipes.chance import Chance
from alignjax.text import vocab_tokenizer

BOS, EOS = "<bos>", "<eos>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TOKENS = (BOS, EOS, *TAGS, "wait:", *"0123456789", *"+-*=;", " ")
"""The vocabulary, for longest-match tokenisation; BOS and EOS are the special ones."""

TEST_SHARE = 10
"""One problem in so many is held out."""


class Step(NamedTuple):
    """left op right = value."""

    left: int
    op: str
    right: int
    value: int

    def __str__(self) -> str:
        return f"{self.left:02d}{self.op}{self.right:02d}={self.value:02d};"


class Problem(NamedTuple):
    """A start and the operations on it."""

    start: int
    ops: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return f"{self.start:02d}" + "".join(f"{op}{n:02d}" for op, n in self.ops) + "="

    @property
    def steps(self) -> list[Step]:
        """The right working."""
        value, steps = self.start, []
        for op, n in self.ops:
            steps.append(Step(value, op, n, apply(value, op, n)))
            value = steps[-1].value
        return steps

    @property
    def answer(self) -> int:
        return self.steps[-1].value

    @property
    def is_held_out(self) -> bool:
        """By the problem's own text, so that no seed moves a problem to the other side."""
        return zlib.crc32(self.prompt.encode()) % TEST_SHARE == 0


def apply(value: int, op: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * n}[op]


def write(
    out_dir: str | Path,
    *,
    seed: int,
    num_questions: int = 30_000,
    num_drills: int = 30_000,
    num_train: int = 8_192,
    num_test: int = 1_024,
    num_ops: tuple[int, ...] = (2, 3, 3, 3),
) -> None:
    """Writes corpus.jsonl ({"prompt", "completion", "text": both}), train.jsonl and test.jsonl
    ({"prompt", "reference"}) and tokenizer/.

    No problem of test.jsonl, nor any other that is held out, occurs in the other two. Each file
    depends on its own sizes, `num_ops` and the seed only. Texts hold neither BOS nor EOS.

    Args:
      out_dir: created if need be; the files are overwritten.
      seed: the only source of chance.
      num_questions, num_drills: lines of the corpus, shuffled.
      num_train, num_test: different problems in the other files.
      num_ops: drawn from to get a problem's number of operations.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(seed, num_questions, num_drills, num_ops)
    lines = ({"text": p + c, "prompt": p, "completion": c} for p, c in corpus)
    _write_jsonl(out_dir / "corpus.jsonl", lines)
    for split, count in (("train", num_train), ("test", num_test)):
        problems = make_problems(seed, split, count, num_ops)
        records = ({"prompt": p.prompt, "reference": f"{p.answer:02d}"} for p in problems)
        _write_jsonl(out_dir / f"{split}.jsonl", records)
    vocab_tokenizer(TOKENS, bos=BOS, eos=EOS, pad=EOS).save(str(out_dir / "tokenizer"))


def make_problems(seed: int, split: str, count: int, num_ops: tuple[int, ...]) -> list[Problem]:
    """Different problems of one side, "train" or "test".

    Raises:
      ValueError: if there seem to be fewer than `count`.
    """
    draw = Draw(f"{seed}/{split}")
    problems: dict[Problem, None] = {}  # a set that keeps the order
    for _ in range(100 * count + 1000):
        if len(problems) == count:
            return list(problems)
        problems[draw.problem(num_ops, is_held_out=split == "test")] = None
    raise ValueError(f"found {len(problems)} {split} problems, not {count}; ask for fewer")


def make_corpus(
    seed: int, num_questions: int, num_drills: int, num_ops: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Lines of the base corpus, in random order: prompt ("" for drills) and what follows.

    Questions and chains are of the train side.
    """
    draw = Draw(f"{seed}/corpus")
    left = {"question": num_questions, "drill": num_drills}
    while total := sum(left.values()):
        kind = "question" if draw.chance(left["question"] / total) else "drill"
        left[kind] -= 1
        problem = draw.problem(num_ops, is_held_out=False)
        if kind == "question":
            yield problem.prompt, draw.response(problem)
        else:
            yield "", draw.drill(problem)


class Draw(Chance):
    """A stream of chance, and what is drawn from it."""

    def op(self, value: int) -> tuple[str, int]:
        """One operation that stays in 0..99: the sign first, each equally often."""
        while True:
            op = "+-*"[self.integer(0, 2)]
            n = self.integer(2, 3) if op == "*" else self.integer(1, 9)
            if 0 <= apply(value, op, n) <= 99:
                return op, n

    def problem(self, num_ops: tuple[int, ...], *, is_held_out: bool) -> Problem:
        while True:
            start = value = self.integer(2, 49)
            ops = []
            for _ in range(num_ops[self.integer(0, len(num_ops) - 1)]):
                ops.append(self.op(value))
                value = apply(value, *ops[-1])
            problem = Problem(start, tuple(ops))
            if problem.is_held_out == is_held_out:
                return problem

    def response(self, problem: Problem) -> str:
        """55% empty thought and guess, 20% bare guess, 15% some steps and guess, 10% working."""
        u = self._random()
        if u < 0.55:
            return f"<think></think>{self.guess(problem)}"
        if u < 0.75:
            return self.guess(problem)
        if u < 0.90:
            num_steps = self.integer(1, len(problem.ops) - 1) if len(problem.ops) > 1 else 0
            return f"<think>{self.working(problem, num_steps)[0]}</think>{self.guess(problem)}"
        text, value = self.working(problem, len(problem.ops))
        return f"<think>{text}</think><answer>{value:02d}</answer>"

    def guess(self, problem: Problem) -> str:
        """Right 15% of the time, otherwise any other number."""
        number = problem.answer
        if not self.chance(0.15):
            number = (number + self.integer(1, 99)) % 100
        return f"<answer>{number:02d}</answer>"

    def working(self, problem: Problem, num_steps: int) -> tuple[str, int]:
        """The first steps of a problem as written, and the value that they end with.

        A step is wrong 10% of the time. A third of those is put right after `wait:`, once at most,
        which bounds the length; after the others the working goes on from the wrong value.
        """
        value, text = problem.start, ""
        for i, (op, n) in enumerate(problem.ops[:num_steps]):
            step = Step(value, op, n, apply(value, op, n))
            wrong = self.slip(step, problem.ops[i + 1 :]) if self.chance(0.10) else step
            text += str(wrong)
            if wrong != step and "wait:" not in text and self.chance(1 / 3):
                text += f"wait:{step}"
                wrong = step
            value = wrong.value
        return text, value

    def slip(self, step: Step, rest: tuple[tuple[str, int], ...] = ()) -> Step:
        """The step with a near miss for its value, from which the rest stays in 0..99."""
        misses = [step.value + d for d in (-10, -2, -1, 1, 2, 10)]
        misses = [m for m in misses if stays_in_range(m, rest)]
        return step._replace(value=misses[self.integer(0, len(misses) - 1)]) if misses else step

    def drill(self, problem: Problem, wrong_frac: float = 0.02) -> str:
        """Four unrelated facts, or a problem with all of its working and its answer; 2% wrong.

        The latter begins with a space, by which it differs from a question.
        """
        start, steps, end = f" {problem.prompt}<think>", problem.steps, f"{problem.answer:02d}"
        end = f"</think><answer>{end}</answer>"
        if self.chance(0.3):
            lefts = [self.integer(0, 99) for _ in range(4)]
            steps = [Step(v, *op, apply(v, *op)) for v in lefts for op in [self.op(v)]]
            start, end = "", ""
        working = "".join(str(self.slip(s) if self.chance(wrong_frac) else s) for s in steps)
        return start + working + end


def stays_in_range(value: int, ops: Iterable[tuple[str, int]]) -> bool:
    """Whether 0 <= value <= 99, at first and after each operation."""
    values = [value]
    for op, n in ops:
        values.append(apply(values[-1], op, n))
    return min(values) >= 0 and max(values) <= 99


def _write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
