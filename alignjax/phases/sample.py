"""Prompts -> several completions of each, judged by rewards or not: records of preferences.

A data phase: nothing is trained. Its file is what `alignjax label` and the phases on preferences
read; of the best completions it also makes what `phase: sft` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Sample, Sampling, Score
from alignjax.data import (
    Example,
    Examples,
    TextOptions,
    examples,
    open_source,
    prompt_encoder,
)
from alignjax.generate import make_generate
from alignjax.models import load, load_eos_ids
from alignjax.phases.produce import State
from alignjax.phases.sample_config import SampleConfig
from alignjax.phases.scoring import Rewards
from alignjax.rewards.combine import too_many_failures
from alignjax.rewards.plain import to_json
from alignjax.rewards.rollout import Task, rollout
from alignjax.text import check_fits, load_tokenizer, stop_ids
from alignjax.train.metrics import replace_file

BEST, FIGURES = "best.jsonl", "sample.json"


COUNTS = {
    "num_prompts": "prompts sampled from",
    "num_dropped": "prompts left out as too long",
    "num_samples": "completions sampled",
    "num_truncated": "of these, cut at max_tokens",
    "num_empty": "completions left out as empty",
    "num_duplicates": "completions left out as equal to an earlier one of the prompt",
    "num_failed_rewards": "completions without a score",
    "num_records": "records written",
    "num_left_out": "prompts left out, as fewer than two responses (or no score) remained",
}
"""What sample.json counts."""


@dataclass(frozen=True)
class _Kept:
    """A completion that becomes a response."""

    sample: Sample
    score: Score | None


class SampleResponses:
    """Implements `phases.produce.DataPhase`."""

    output = "preferences.jsonl"
    shown = ("num_prompts", "num_records", "num_failed_rewards")

    def __init__(self, config: SampleConfig, mesh: Mesh):
        self._config = config
        rollout, where = config.rollout, config.tokenizer or config.model.path
        dtype = compute_dtype(config.model.compute_dtype, mesh.devices.flat[0].platform)
        model, self._params = load(config.model.path, mesh=mesh, compute_dtype=dtype)
        self._tokenizer = load_tokenizer(where)
        check_fits(self._tokenizer, model.config.vocab_size, where)
        most = rollout.max_prompt_tokens + rollout.max_tokens
        context = model.config.max_position_embeddings
        if most > context:
            raise UserError(
                f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and max_tokens="
                f"{rollout.max_tokens} exceed the model's context of {context} tokens; lower one"
            )
        source = Examples(open_source(config.data.train), config.data.text.fields)
        self._limit = config.data.num_prompts or len(source)
        self._prompts = examples(
            source,
            prompt_encoder(config.data.text, self._tokenizer),
            num_prompts=rollout.num_prompts,
            prompt_len=rollout.max_prompt_tokens,
            overlong=config.data.overlong,
            shuffle=False,
            num_epochs=1,
        )
        self._sampling = Sampling(
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            max_tokens=rollout.max_tokens,
            stop_tokens=stop_ids(
                self._tokenizer, rollout.stop_tokens, load_eos_ids(config.model.path)
            ),
            num_samples=rollout.num_samples,
        )
        self._generate = make_generate(model, mesh=mesh, max_rows=rollout.max_rows)
        self._rewards: Rewards | None = None
        if config.rewards is not None:
            log_path = Path(config.output_dir) / config.name / "rewards.log"
            self._rewards = Rewards(
                config.rewards, self._tokenizer, mesh, max_tokens=most, log_path=log_path
            )

    @property
    def warnings(self) -> list[str]:
        return [] if self._rewards is None else self._rewards.warnings

    def init(self) -> State:
        return {
            "position": self._prompts.get_state(),
            "counts": dict.fromkeys(COUNTS, 0),
            "best_of": {},  # k -> the sum over prompts of the mean highest score of k samples
            "num_compared": 0,  # prompts in these sums: those whose samples all have a score
        }

    def produce(self, state: State) -> tuple[Sequence[Mapping[str, Any]], State] | None:
        counts = dict(state["counts"])
        left = self._limit - counts["num_prompts"]
        self._prompts.set_state(state["position"])
        prompts = next(self._prompts, [])[:left] if left > 0 else []
        if not prompts:
            return None
        tasks = [Task(p.tokens, p.example.reference, p.example.fields) for p in prompts]
        key = named_key(jax.random.key(self._config.seed), "sample", counts["num_prompts"])
        out = rollout(
            self._generate, self._rewards or no_scores, self._tokenizer, self._params, tasks, key,
            self._sampling, prompt_len=self._config.rollout.max_prompt_tokens,
        )  # fmt: skip
        if self._rewards is not None:
            reason = too_many_failures(out.scores, self._rewards.config.max_failure_frac)
            if reason is not None:
                raise UserError(reason)
            counts["num_failed_rewards"] += sum(score.value is None for score in out.scores)
        counts["num_prompts"] += len(prompts)
        counts["num_samples"] += len(out.samples)
        counts["num_truncated"] += int(out.is_truncated.sum())
        counts["num_dropped"] = self._prompts.num_dropped
        size, records = self._sampling.num_samples, []
        best_of, num_compared = dict(state["best_of"]), state["num_compared"]
        for i, prompt in enumerate(prompts):
            group = slice(i * size, (i + 1) * size)
            scores = [score.value for score in out.scores[group]]
            if all(score is not None for score in scores):
                num_compared += 1
                for k in _powers(size):
                    best = expected_best(scores, k)  # type: ignore[arg-type]
                    best_of[str(k)] = best_of.get(str(k), 0.0) + best
            kept = self._kept(out.samples[group], out.scores[group], counts)
            record = self._record(prompt.example, kept)
            counts["num_left_out" if record is None else "num_records"] += 1
            records += [] if record is None else [record]
        return records, {
            "position": self._prompts.get_state(),
            "counts": counts,
            "best_of": best_of,
            "num_compared": num_compared,
        }

    def _kept(
        self, samples: Sequence[Sample], scores: Sequence[Score], counts: dict[str, int]
    ) -> list[_Kept]:
        """The completions of a prompt that can be compared: none empty, no two equal."""
        kept: dict[str, _Kept] = {}
        for sample, score in zip(samples, scores, strict=True):
            if not sample.completion.strip():
                counts["num_empty"] += 1
            elif sample.completion in kept:
                counts["num_duplicates"] += 1
            elif not (sample.is_truncated and self._config.truncated == "drop"):
                kept[sample.completion] = _Kept(sample, score if self._rewards else None)
        return list(kept.values())

    def _record(self, example: Example, kept: Sequence[_Kept]) -> dict[str, Any] | None:
        """The record of a prompt; None if nothing can be said or asked of its responses."""
        scores = [None if one.score is None else one.score.value for one in kept]
        is_judged = self._rewards is not None
        if len(kept) < 2 or (is_judged and all(score is None for score in scores)):
            return None
        reference = {} if example.reference is None else {"reference": example.reference}
        own = {
            "prompt": written_prompt(example, self._config.data.text, self._config.prompts_as),
            "responses": [one.sample.completion for one in kept],
            **({"scores": scores} if is_judged else {}),
            "num_tokens": [one.sample.num_tokens for one in kept],
            "is_truncated": [one.sample.is_truncated for one in kept],
        }
        fields = {k: v for k, v in {**example.fields, **reference}.items() if k not in own}
        return own | json.loads(to_json(fields))

    def finish(self, state: State, records: Iterable[dict[str, Any]], run_dir: Path) -> str:
        """Writes sample.json, and best.jsonl where there are scores."""
        if self._rewards is not None:
            self._rewards.close()
            lines = [json.dumps(_best(record), ensure_ascii=False) + "\n" for record in records]
            replace_file(run_dir / BEST, "".join(lines).encode(errors="backslashreplace"))
        figures: dict[str, Any] = dict(state["counts"])
        if state["num_compared"]:
            means = {k: total / state["num_compared"] for k, total in state["best_of"].items()}
            figures |= {"num_compared": state["num_compared"], "reward_of_best_of": means}
        replace_file(run_dir / FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
        said = [f"{value} {COUNTS[name]}" for name, value in state["counts"].items() if value]
        if "reward_of_best_of" in figures:
            of = figures["reward_of_best_of"].items()
            said.append("mean reward of the best of " + ", ".join(f"{k}: {m:.4g}" for k, m in of))
        return "; ".join(said)


def written_prompt(
    example: Example, text: TextOptions, way: Literal["seen", "text", "messages"] = "seen"
) -> str | list[dict[str, Any]]:
    """The prompt of an example as text or as messages; `way` as `SampleConfig.prompts_as`."""
    if example.messages is not None:
        messages = list(example.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    prompt = example.prompt or ""
    if way == "text" or (way == "seen" and not text.chat):
        return prompt
    system = [{"role": "system", "content": text.system}] if text.system is not None else []
    return [*system, {"role": "user", "content": prompt}]


def expected_best(scores: Sequence[float], k: int) -> float:
    """Mean highest score of k of n samples, over all choices of k.

    Of the i-th lowest of n, C(i - 1, k - 1) of C(n, k) choices have it as their highest. Unbiased,
    unlike the highest of all n is for a smaller k.

    Args:
      scores: n of them, 1 <= k <= n.
    Source: as pass@k, arXiv:2107.03374 eq. 1, for values other than 0 and 1.
    """
    ordered = sorted(scores)
    chosen = (math.comb(i, k - 1) * score for i, score in enumerate(ordered))
    return math.fsum(chosen) / math.comb(len(ordered), k)


def _best(record: Mapping[str, Any]) -> dict[str, Any]:
    """The best response of a record, the first if several are, as `phase: sft` reads it: `prompt`
    and `completion`, or `messages`."""
    scored = [(s, -i) for i, s in enumerate(record["scores"]) if s is not None]
    score, place = max(scored)
    response = record["responses"][-place]
    prompt = record["prompt"]
    if isinstance(prompt, str):
        found = {"prompt": prompt, "completion": response}
    else:
        found = {"messages": [*prompt, {"role": "assistant", "content": response}]}
    own = {"prompt", "responses", "scores", "num_tokens", "is_truncated"}
    rest = {key: value for key, value in record.items() if key not in own | found.keys()}
    return {**found, "score": score, **rest}


def no_scores(samples: Sequence[Sample]) -> list[Score]:
    """A `ScoreFn` that judges nothing."""
    return [Score(None)] * len(samples)


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    powers = [2**i for i in range(n.bit_length())]
    return powers if powers[-1] == n else [*powers, n]
