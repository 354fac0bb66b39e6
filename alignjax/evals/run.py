"""A model and held-out problems -> accuracy with its interval, and what the model answered."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from pydantic import Field, field_validator

from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Sampling, ScoreFn
from alignjax.data import Examples, TextConfig, examples, open_source, prompt_encoder
from alignjax.evals.accuracy import Estimate, maj_at_k, pass_at_1, pass_at_k
from alignjax.generate import make_generate
from alignjax.models import load, load_eos_ids
from alignjax.rewards.answers import find_answer, visible
from alignjax.rewards.combine import RewardConfig
from alignjax.rewards.rollout import Rollouts, Task, rollout
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import HFTokenizer, check_fits, load_tokenizer, stop_ids


class EvalConfig(Config):
    """What to measure. The config of a grpo run has all of it but the model."""

    model: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    tokenizer: str | None = None
    data: str | list[str]
    text: TextConfig
    rewards: RewardConfig
    correct: str = "accuracy"
    """The part of the reward that says whether an answer is right: at least 0.5 counts as right."""
    answer: str = "answer_tag"
    """Where the answer stands that maj@k votes on; see rewards.verify."""
    num_problems: int | None = Field(None, ge=1)
    """The first so many; all if not given."""
    num_samples: int = Field(8, ge=1)
    """Samples of each problem (n)."""
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_prompt_tokens: int = Field(256, ge=1)
    overlong: Literal["error", "drop"] = "error"
    """What to do with a longer prompt; `drop` leaves the problem out, so look at num_problems."""
    max_tokens: int = Field(256, ge=1)
    stop_tokens: list[str] = []
    """Tokens that end a completion, besides EOS and what the model's directory lists as such."""
    max_rows: int = Field(1024, ge=1)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    seed: int = Field(0, ge=0)

    @field_validator("answer")
    @classmethod
    def _is_place(cls, place: str) -> str:
        try:
            find_answer("", place)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return place


@dataclass(frozen=True)
class Report:
    """The figures, by name, and every sample."""

    estimates: dict[str, Estimate]
    mean_reward: float
    mean_length: float
    truncated_frac: float
    num_failed: int
    rollouts: Rollouts

    def as_json(self) -> dict[str, Any]:
        figures = {
            name: {"mean": e.mean, "low": e.low, "high": e.high}
            for name, e in self.estimates.items()
        }
        return figures | {
            "reward": self.mean_reward,
            "mean_length": self.mean_length,
            "truncated_frac": self.truncated_frac,
            "num_failed_rewards": self.num_failed,
            "num_problems": len(self.rollouts.tasks),
            "num_samples": len(self.rollouts.samples) // len(self.rollouts.tasks),
        }


MakeRewards = Callable[[RewardConfig, HFTokenizer, Mesh], AbstractContextManager[ScoreFn]]
"""What makes a ScoreFn of a config, the policy's tokenizer and the devices of reward models."""


def evaluate(config: EvalConfig, make_rewards: MakeRewards) -> Report:
    """Samples n answers of each problem and scores them.

    A sample whose reward failed counts as wrong here, and is counted: leaving it out would make a
    model look better for answers that break the verifier.

    Args:
      make_rewards: such as `phases.scoring.Rewards`.
    """
    mesh = make_mesh(MeshConfig())
    dtype = compute_dtype(config.compute_dtype, mesh.devices.flat[0].platform)
    model, params = load(config.model, mesh=mesh, compute_dtype=dtype)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    check_fits(tokenizer, model.config.vocab_size, config.tokenizer or config.model)
    source = Examples(open_source(config.data), config.text.fields)
    prompts = next(
        examples(
            source,
            prompt_encoder(config.text, tokenizer),
            num_prompts=min(config.num_problems or len(source), len(source)),
            prompt_len=config.max_prompt_tokens,
            overlong=config.overlong,
            shuffle=False,
            num_epochs=1,
        )
    )
    tasks = [Task(p.tokens, p.example.reference, p.example.fields) for p in prompts]
    longest, context = max(len(t.tokens) for t in tasks), model.config.max_position_embeddings
    if longest + config.max_tokens > context:
        raise UserError(
            f"a prompt of {longest} tokens and max_tokens={config.max_tokens} exceed the model's "
            f"context of {context}; lower max_tokens"
        )
    sampling = Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        stop_tokens=stop_ids(tokenizer, config.stop_tokens, load_eos_ids(config.model)),
        num_samples=config.num_samples,
    )
    with make_rewards(config.rewards, tokenizer, mesh) as score:
        out = rollout(
            make_generate(model, mesh=mesh, max_rows=config.max_rows),
            score,
            tokenizer,
            params,
            tasks,
            jax.random.PRNGKey(config.seed),
            sampling,
            prompt_len=config.max_prompt_tokens,
        )
    if config.correct not in out.part_names:
        there_are = (
            ", ".join(out.part_names) or f"none, as every reward failed: {out.scores[0].error}"
        )
        raise UserError(
            f"correct={config.correct!r} is no part of the reward; there are {there_are}"
        )
    return report(out, config.correct, config.answer)


def report(rollouts: Rollouts, correct_part: str, answer: str) -> Report:
    """pass@1, and where there are several samples pass@k and maj@k at k = n and powers of 2."""
    correct = rollouts.part(correct_part) >= 0.5
    n = correct.shape[1]
    found = [find_answer(visible(s.prompt, s.completion), answer) for s in rollouts.samples]
    answers = [found[i : i + n] for i in range(0, len(found), n)]
    estimates = {"pass@1": pass_at_1(correct)}
    for k in _powers(n):
        estimates[f"pass@{k}"] = pass_at_k(correct, k)
        estimates[f"maj@{k}"] = maj_at_k(answers, correct, k)
    valued = [score.value for score in rollouts.scores if score.value is not None]
    return Report(
        estimates,
        mean_reward=sum(valued) / max(1, len(valued)),
        mean_length=float(rollouts.completions.lengths.mean()),
        truncated_frac=float(rollouts.is_truncated.mean()),
        num_failed=len(rollouts.scores) - len(valued),
        rollouts=rollouts,
    )


def write_report(report: Report, folder: Path) -> None:
    """eval.json with the figures, and eval_samples.jsonl with every answer."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.as_json(), indent=2) + "\n"
    (folder / "eval.json").write_text(text, encoding="utf-8")
    samples = folder / "eval_samples.jsonl"
    # Half of a surrogate pair is no UTF-8; escaped, it is JSON.
    with samples.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for record in report.rollouts.records(range(len(report.rollouts.samples))):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _powers(n: int) -> Sequence[int]:
    powers = [2**i for i in range(1, n.bit_length()) if 2**i <= n]
    return powers if n in (*powers, 1) else [*powers, n]
