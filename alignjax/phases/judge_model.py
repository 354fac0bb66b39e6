"""A model of our own as a judge: the probabilities of the options are computed, not sampled.

Without chain of thought a question costs one forward pass, with its options beside each other after
one prompt; with it, the thought is sampled first. Every question is computed in a row of its own,
whose length is a rung of a ladder, so that an answer does not depend on which others are asked.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core import digest
from alignjax.core.errors import UserError
from alignjax.core.hub import resolve
from alignjax.core.precision import compute_dtype
from alignjax.core.types import LENGTH, Params, Sampling
from alignjax.data import Element, TextOptions, branch_segments
from alignjax.data.comparison_rows import pack_elements
from alignjax.data.encode import chat_template
from alignjax.generate import make_generate
from alignjax.generate.engine import bucket
from alignjax.models import Model, load, load_eos_ids
from alignjax.phases.common import score_tokens
from alignjax.phases.comparisons import per_element, token_rows_of
from alignjax.rewards.judge_answer import Answer, Question, Usage
from alignjax.rewards.judge_config import LocalConfig, ThinkConfig
from alignjax.sharding import batch_shards, fetch, put_batch
from alignjax.text import (
    check_fits,
    encode_chat_prompt,
    encode_prompt,
    load_tokenizer,
    stop_ids,
)
from alignjax.train.step import Batch

_SHORTEST_ROW = 64
_ROW_TOKENS = 4096
"""Tokens of the rows that one device computes at once, unless a single row has more."""


class ModelAsk:
    """An `Ask`. One thread at a time.

    Attributes:
      identity: of what answers: the contents of the model's files, and what else changes answers.
      account: under which its questions are counted.
      specials: texts of the special tokens.
    """

    def __init__(self, config: LocalConfig, think: ThinkConfig | None, mesh: Mesh):
        """Raises: UserError: if the model cannot be read."""
        self._config, self._think, self._mesh = config, think, mesh
        dtype = compute_dtype(config.compute_dtype, mesh.devices.flat[0].platform)
        self._model, self._params = load(
            config.path, mesh=mesh, compute_dtype=dtype, param_dtype=config.param_dtype
        )
        self._tokenizer = load_tokenizer(config.path)
        check_fits(self._tokenizer, self._model.config.vocab_size, config.path)
        self._template = None
        if config.chat:
            text = TextOptions(chat_template=config.chat_template)
            self._template = chat_template(text, self._tokenizer)
        elif config.system is not None or config.chat_template is not None:
            raise UserError("judge.model: system and chat_template go with chat: true")
        self._generate = make_generate(self._model, mesh=mesh, max_rows=config.batch_size)
        self._stops = stop_ids(self._tokenizer, eos_ids=load_eos_ids(config.path))
        self._logps = jax.jit(
            functools.partial(option_logps, self._model, batch_shards(mesh)),
            static_argnames="num_options",
        )
        self.specials = self._tokenizer.special_texts
        self.account = f"model {config.path}"
        self.identity = json.dumps([
            digest.of_path(resolve(config.path)), dtype, config.param_dtype, config.chat,
            config.system,
            None if self._template is None else self._template.source, config.template_variables,
            None if think is None else [think.max_tokens, config.temperature, config.seed],
        ])  # fmt: skip

    def __call__(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer]]:
        """See `judge_answer.Ask`."""
        size = self._config.batch_size
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            answers = self._answers(part)
            yield dict(enumerate(answers, start))

    def _answers(self, questions: Sequence[Question]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        prompts: dict[int, list[int]] = {}
        for i, question in enumerate(questions):
            try:
                prompts[i] = self._encoded(question)
            except UserError as error:  # A text that this vocabulary cannot write.
                answers[i] = Answer(error=f"judge.model: {error}")
        thoughts = {i: ([], "") for i in prompts}
        if self._think is not None and prompts:
            thoughts = self._thoughts({i: questions[i] for i in prompts}, prompts)
        elements: dict[int, Element] = {}
        for i, ids in prompts.items():
            own, said = thoughts[i]
            try:
                elements[i] = self._element(questions[i], [*ids, *own])
            except UserError as error:
                answers[i] = Answer(said, error=f"judge.model: {error}")
        for i, logps in self._scored(elements).items():
            usage = Usage(1, len(elements[i].prompt), len(thoughts[i][0]))
            answers[i] = Answer(thoughts[i][1], logps, usage)
        return [answers[i] for i in range(len(questions))]

    def _encoded(self, question: Question) -> list[int]:
        if self._template is None:
            ids = encode_prompt(self._tokenizer, question.text)
        else:
            system = self._config.system
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": question.text})
            variables = self._config.template_variables
            ids = encode_chat_prompt(self._tokenizer, self._template, messages, **variables)
        if not ids:
            raise UserError("the question has no tokens")
        room = 0 if self._think is None else self._think.max_tokens
        context = self._model.config.max_position_embeddings
        if len(ids) + room > context:
            raise UserError(
                f"a question of {len(ids)} tokens"
                + (f" and a thought of up to {room}" if room else "")
                + f" do not fit into the model's context of {context}"
            )
        return ids

    def _thoughts(
        self, questions: Mapping[int, Question], prompts: Mapping[int, list[int]]
    ) -> dict[int, tuple[list[int], str]]:
        """Of each question what was sampled before the verdict: ids, and the text."""
        assert self._think is not None
        longest = max(map(len, prompts.values()))
        rows = np.zeros((len(prompts), longest), np.int32)
        for row, ids in zip(rows, prompts.values(), strict=True):
            row[: len(ids)] = ids
        lengths = np.array([len(ids) for ids in prompts.values()], np.int32)
        sampling = Sampling(
            temperature=self._config.temperature,
            max_tokens=self._think.max_tokens,
            stop_tokens=self._stops,
        )
        # By what is asked, so that a run which is continued samples the same.
        asked = json.dumps([[q.text, q.attempt] for q in questions.values()])
        number = int.from_bytes(hashlib.sha256(asked.encode()).digest()[:4], "big")
        key = jax.random.fold_in(jax.random.key(self._config.seed), number)
        out = self._generate(self._params, rows, lengths, key, sampling)
        found = {}
        for place, i in enumerate(prompts):
            ids = out.tokens[place, : out.lengths[place]].tolist()
            if out.finish_reasons[place] != LENGTH:
                ids = ids[:-1]  # The stop token would end the turn before the verdict.
            ids = self._before_cue(ids, str(questions[i].cue))
            found[i] = ids, self._tokenizer.decode(ids)
        return found

    def _before_cue(self, ids: list[int], cue: str) -> list[int]:
        """What stands before the first cue of a thought: after it the verdict is computed."""
        if cue not in self._tokenizer.decode(ids):
            return ids
        short = next(n for n in range(len(ids) + 1) if cue in self._tokenizer.decode(ids[:n]))
        start = self._tokenizer.decode(ids[:short]).index(cue)
        while short and len(self._tokenizer.decode(ids[:short])) > start:
            short -= 1
        return ids[:short]

    def _element(self, question: Question, before: list[int]) -> Element:
        """The options after what stands before them. With a cue, it begins each of them, and what
        they have in common cancels."""
        texts = question.options
        if question.cue is not None:
            gap = "\n" if self._config.chat else ""
            texts = tuple(f"{gap}{question.cue} {option.strip()}" for option in texts)
        ids = [np.array(self._tokenizer.encode(text, before), np.int32) for text in texts]
        if len({one.tobytes() for one in ids}) < len(ids) or not all(map(len, ids)):
            raise UserError(f"options {list(question.options)} are not unlike tokens of the model")
        most = len(before) + max(map(len, ids))
        context = self._model.config.max_position_embeddings
        if most > context:
            raise UserError(f"{most} tokens do not fit into the model's context of {context}")
        return Element(np.array(before, np.int32), tuple(ids), (1,) * len(ids))

    def _scored(self, elements: Mapping[int, Element]) -> dict[int, tuple[float, ...]]:
        """Of each question the log-probs of its options."""
        by_shape: dict[tuple[tuple[int, int], int], list[int]] = {}
        for i, element in elements.items():
            shape = asked_shape(element.num_tokens(shared_prompt=True), self._mesh)
            by_shape.setdefault((shape, len(element.ranks)), []).append(i)
        found = {}
        for ((num_rows, row_len), num_options), places in by_shape.items():
            for start in range(0, len(places), num_rows):
                part = places[start : start + num_rows]
                rows = pack_elements(
                    [elements[i] for i in part], num_rows=num_rows, row_len=row_len,
                    num_responses=num_options, shared_prompt=True, packed=False,
                )  # fmt: skip
                batch = put_batch({name: rows[name] for name in ARRAYS}, self._mesh)
                logps = fetch(self._logps(self._params, batch, num_options=num_options))
                for i, of_options in zip(part, logps[:, 0].astype(np.float64), strict=False):
                    found[i] = exclusive(elements[i].completions, of_options)
        return found


def option_logps(
    model: Model, num_shards: int, params: Params, batch: Batch, num_options: int
) -> Array:
    """[R, 1, K] float32, nats: the summed log-probs of each option.

    Args:
      batch: R questions with their K options, one to a row, as `pack_elements` lays them out.
    """
    rows = token_rows_of(batch, num_options, shared_prompt=True)
    out = score_tokens(model, params, rows, num_shards=num_shards, with_entropy=False)
    segments = branch_segments(batch, num_options)
    num_segments = batch["ranks"].shape[1] * num_options
    sums = losses.sequence_logps(out.logps, batch["mask"], segments, num_segments=num_segments).sums
    return per_element(sums, batch)


def asked_shape(num_tokens: int, mesh: Mesh) -> tuple[int, int]:
    """Rows, and tokens of each, that are computed at once of questions of so many tokens."""
    row_len = bucket(num_tokens, smallest=_SHORTEST_ROW)
    return batch_shards(mesh) * max(1, _ROW_TOKENS // row_len), row_len


ARRAYS = ("tokens", "mask", "positions", "segment_ids", "branches", "ranks")
"""Of `pack_elements` what `option_logps` reads."""


def exclusive(options: Sequence[np.ndarray], logps: np.ndarray) -> tuple[float, ...]:
    """Log-probs of options of which one may begin another, such as 1 and 10 in digits.

    The probability of the tokens of 1 includes that of 10, which is taken off it.

    Args:
      options: token ids, [length] int32 each, no two equal.
      logps: [K] float64, nats, of these tokens.
    """
    texts = [tuple(one.tolist()) for one in options]
    chances = np.exp(logps - logps.max())
    found = []
    for text, logp, left in zip(texts, logps, chances, strict=True):
        longer = [i for i, t in enumerate(texts) if len(t) > len(text) and t[: len(text)] == text]
        # Of those that begin with each other the shortest stands for all.
        next_ = [
            i for i in longer
            if not any(texts[i][: len(texts[j])] == texts[j] for j in longer if j != i)
        ]  # fmt: skip
        if next_:
            left -= chances[next_].sum()
            logp = math.log(left) + logps.max() if left > 0 else -math.inf
        found.append(float(logp))
    return tuple(found)
