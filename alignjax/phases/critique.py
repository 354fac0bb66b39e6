"""Prompts -> answers, which the model criticises by principles and revises: records for SFT.

The supervised half of Constitutional AI (arXiv:2212.08073 sec. 3). A data phase: nothing is
trained. Every step is kept, to be read (`alignjax report`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.core import digest
from alignjax.core.config import to_dict
from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Sample, Sampling
from alignjax.data import Example, Examples, examples, open_source, prompt_encoder
from alignjax.generate import make_generate
from alignjax.models import load, load_eos_ids
from alignjax.phases.critique_config import CritiqueConfig, StepSampling
from alignjax.phases.critique_records import Chain, sft_record, trace_record
from alignjax.phases.produce import State
from alignjax.phases.responses import no_scores, written_prompt
from alignjax.report.critiques import by_principle
from alignjax.rewards.critique_template import Prompt, load_critique_template
from alignjax.rewards.judge_prompt import defused
from alignjax.rewards.rollout import Task, rollout
from alignjax.text import check_fits, load_tokenizer, stop_ids
from alignjax.train.metrics import replace_file

REVISIONS, FIGURES = "revisions.jsonl", "critique.json"

COUNTS = {
    "num_prompts": "prompts answered",
    "num_dropped": "prompts left out as too long",
    "num_records": "answers gone through",
    "num_cut_responses": "answers cut at max_tokens",
    "num_empty_responses": "answers that were empty",
    "num_critiques": "critiques written",
    "num_cut_critiques": "critiques cut at max_tokens",
    "num_empty_critiques": "critiques that were empty",
    "num_revisions": "revisions written",
    "num_cut_revisions": "revisions cut at max_tokens",
    "num_empty_revisions": "revisions that were empty",
    "num_overlong": "rounds without a critique or revision, as it did not fit into the context",
    "num_changed": "rounds that changed the answer",
    "num_left_out": "answers left out of revisions.jsonl, as nothing revised them",
}
"""What critique.json counts."""


class Critique:
    """Implements `phases.produce.DataPhase`."""

    output = "trace.jsonl"
    shown = ("num_prompts", "num_critiques", "num_revisions", "num_changed")

    def __init__(self, config: CritiqueConfig, mesh: Mesh):
        self._config = config
        where = config.tokenizer or config.model.path
        self._constitution = config.constitution.open()
        self._template = load_critique_template(config.template)
        num = len(self._constitution.principles)
        if config.num_rounds > num:
            raise UserError(
                f"num_rounds={config.num_rounds}, but the constitution has {num} principles, none "
                f"of which is drawn twice; use at most {num} rounds, or leave fewer out"
            )
        text = config.data.text
        is_chat = text.chat or text.fields.messages is not None
        if is_chat != self._template.chat:
            kinds = {True: "messages of a chat", False: "plain text"}
            raise UserError(
                f"template: {config.template} asks in {kinds[self._template.chat]}, but prompts "
                f"are {kinds[is_chat]} (data.text.chat, data.text.fields.messages); take another "
                "template, or set data.text.chat"
            )
        dtype = compute_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
        model, self._params = load(config.model.path, mesh=mesh, compute_dtype=dtype)
        self._tokenizer = load_tokenizer(where)
        check_fits(self._tokenizer, model.config.vocab_size, where)
        self._context = model.config.max_position_embeddings
        steps = config.rollout
        most = steps.max_prompt_tokens + steps.response.max_tokens
        for name in ("critique", "revision"):
            most = max(most, 1 + getattr(steps, name).max_tokens)
        if most > self._context:
            raise UserError(
                f"rollout: a prompt of max_prompt_tokens={steps.max_prompt_tokens} and the "
                f"max_tokens of an answer ({steps.response.max_tokens}), or those of a critique or "
                f"revision alone, exceed the model's context of {self._context} tokens; lower them"
            )
        source = Examples(open_source(config.data.train), text.fields)
        self._limit = config.data.num_prompts or len(source)
        self._encode = prompt_encoder(text, self._tokenizer)
        self._prompts = examples(
            source,
            self._encode,
            num_prompts=steps.num_prompts,
            prompt_len=steps.max_prompt_tokens,
            overlong=config.data.overlong,
            shuffle=False,
            num_epochs=1,
        )
        self._stop = stop_ids(self._tokenizer, steps.stop_tokens, load_eos_ids(config.model.path))
        self._generate = make_generate(model, mesh=mesh, max_rows=steps.max_rows)
        self._digests = {
            "constitution": digest.of_value(to_dict(self._constitution)),
            "template": digest.of_value(to_dict(self._template)),
        }

    @property
    def warnings(self) -> list[str]:
        return []

    def init(self) -> State:
        return {
            "position": self._prompts.get_state(),
            "counts": dict.fromkeys(COUNTS, 0),
            "digests": self._digests,
        }

    def produce(self, state: State) -> tuple[Sequence[Mapping[str, Any]], State] | None:
        if state["digests"] != self._digests:
            raise UserError(
                "the constitution or the template has changed since the run began; bring it back, "
                "choose another name (name=...), or delete the directory"
            )
        counts = dict(state["counts"])
        left = self._limit - counts["num_prompts"]
        self._prompts.set_state(state["position"])
        prompts = next(self._prompts, [])[:left] if left > 0 else []
        if not prompts:
            return None
        key = named_key(jax.random.key(self._config.seed), "critique", counts["num_prompts"])
        chains = self._answered(prompts, counts["num_prompts"], named_key(key, "response"), counts)
        for number in range(self._config.num_rounds):
            self._round(chains, number, named_key(key, "round", number), counts)
        counts["num_prompts"] += len(prompts)
        counts["num_dropped"] = self._prompts.num_dropped
        counts["num_records"] += len(chains)
        counts["num_left_out"] += sum(not chain.is_revised for chain in chains)
        records = [trace_record(chain) for chain in chains]
        return records, state | {"position": self._prompts.get_state(), "counts": counts}

    def _answered(
        self, prompts: Sequence[Any], first: int, key: jax.Array, counts: dict[str, int]
    ) -> list[Chain]:
        """The first answers to some prompts, of which the first is number `first` of all."""
        config, size = self._config, self._config.rollout.num_samples
        samples = self._sampled(
            [prompt.tokens for prompt in prompts], config.rollout.response, key,
            num_samples=size, prompt_len=config.rollout.max_prompt_tokens,
        )  # fmt: skip
        chains = []
        for i, sample in enumerate(samples):
            example = prompts[i // size].example
            drawn = self._constitution.ordered(f"{config.seed}/{first + i // size}/{i % size}")
            fault = self._fault("response", sample, counts)
            prompt = written_prompt(example, config.data.text)
            answer, length = sample.completion, sample.num_tokens
            chains.append(Chain(example, prompt, drawn, sample, fault, answer, length))
        return chains

    def _round(
        self, chains: Sequence[Chain], number: int, key: jax.Array, counts: dict[str, int]
    ) -> None:
        """Adds a critique and a revision to those that have an answer."""
        open_ = [chain for chain in chains if chain.fault is None]
        for chain in open_:
            chain.rounds.append({"principle": chain.principles[number].name, "fault": None})
        if self._template.critique is not None:
            asked = [
                self._template.for_critique(c.principles[number], c.prompt, self._safe(c.answer))
                for c in open_
            ]
            open_ = self._step("critique", open_, asked, named_key(key, "critique"), counts)
        asked = []
        for chain in open_:
            critique = chain.rounds[-1].get("critique")
            asked.append(
                self._template.for_revision(
                    chain.principles[number],
                    chain.prompt,
                    self._safe(chain.answer),
                    None if critique is None else self._safe(critique),
                )
            )
        for chain in self._step("revision", open_, asked, named_key(key, "revision"), counts):
            now = chain.rounds[-1]
            counts["num_changed"] += now["revision"] != chain.answer
            chain.answer, chain.num_tokens = now["revision"], now["revision_num_tokens"]

    def _step(
        self, name: str, chains: Sequence[Chain], asked: Sequence[Prompt], key: jax.Array,
        counts: dict[str, int],
    ) -> list[Chain]:  # fmt: skip
        """Writes a critique or a revision into the last round of each; returns those that can be
        gone on with, in order."""
        sampling: StepSampling = getattr(self._config.rollout, name)
        fitting, ids = [], []
        for chain, prompt in zip(chains, asked, strict=True):
            found = self._ids(prompt, chain.example)
            if len(found) + sampling.max_tokens <= self._context:
                fitting.append(chain)
                ids.append(found)
            else:
                counts["num_overlong"] += 1
                chain.rounds[-1]["fault"] = f"{name} does not fit into the context"
        if not fitting:
            return []
        longest = max(map(len, ids))
        samples = self._sampled(ids, sampling, key, num_samples=1, prompt_len=longest)
        counts[f"num_{name}s"] += len(samples)
        for chain, sample in zip(fitting, samples, strict=True):
            chain.rounds[-1] |= {
                name: sample.completion,
                f"{name}_num_tokens": sample.num_tokens,
                "fault": self._fault(name, sample, counts),
            }
        return [chain for chain in fitting if chain.rounds[-1]["fault"] is None]

    def _fault(self, name: str, sample: Sample, counts: dict[str, int]) -> str | None:
        """Why a text is not taken, if it is not; counts what is wrong with it."""
        counts[f"num_cut_{name}s"] += sample.is_truncated
        if not sample.completion.strip():
            counts[f"num_empty_{name}s"] += 1
            return f"{name} is empty"
        is_refused = sample.is_truncated and self._config.truncated == "discard"
        return f"{name} was cut at max_tokens" if is_refused else None

    def _safe(self, text: str) -> str:
        """What the model wrote, as it reads it again: special tokens that are spelled out in it are
        broken apart, or they would end its turn there."""
        return defused(text, self._tokenizer.special_texts)

    def _ids(self, prompt: Prompt, example: Example) -> np.ndarray:
        if isinstance(prompt, str):
            return self._encode(Example(prompt=prompt))
        return self._encode(Example(messages=[*map(dict, prompt)], tools=example.tools))

    def _sampled(
        self, prompts: Sequence[np.ndarray], step: StepSampling, key: jax.Array, *,
        num_samples: int, prompt_len: int,
    ) -> list[Sample]:  # fmt: skip
        sampling = Sampling(
            temperature=step.temperature, top_k=step.top_k, top_p=step.top_p,
            max_tokens=step.max_tokens, stop_tokens=self._stop, num_samples=num_samples,
        )  # fmt: skip
        return rollout(
            self._generate, no_scores, self._tokenizer, self._params, [Task(p) for p in prompts],
            key, sampling, prompt_len=prompt_len,
        ).samples  # fmt: skip

    def finish(self, state: State, records: Iterable[dict[str, Any]], run_dir: Path) -> str:
        """Writes revisions.jsonl and critique.json."""
        lines, kept = [], []
        for record in records:
            kept.append({"response": record["response"], "rounds": record["rounds"],
                         "num_tokens": record["num_tokens"]})  # fmt: skip
            if record["revision"] is not None:
                lines.append(json.dumps(sft_record(record), ensure_ascii=False) + "\n")
        replace_file(run_dir / REVISIONS, "".join(lines).encode(errors="backslashreplace"))
        figures = {
            **state["counts"],
            "digests": state["digests"],
            "by_principle": by_principle(kept),
            "constitution": to_dict(self._constitution),
        }
        text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
        replace_file(run_dir / FIGURES, text.encode(errors="backslashreplace"))
        said = [f"{value} {COUNTS[name]}" for name, value in state["counts"].items() if value]
        return "; ".join(said)

    def close(self) -> None:
        """Holds nothing but arrays."""
