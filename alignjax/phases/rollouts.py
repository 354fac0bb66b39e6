"""What phases that sample share: prompts -> scored completions -> rows, metrics, evaluations."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.types import GenerateFn, Maximum, Minimum, Params, Sampling, Score, ScoreFn
from alignjax.data import (
    Examples,
    Prompt,
    RecordIterator,
    examples,
    open_source,
    pack,
    prompt_encoder,
    sequence_ids,
    share_prompts,
    shared_row_len,
)
from alignjax.generate import make_generate
from alignjax.generate.exact import make_exact_generate
from alignjax.losses import token_mean
from alignjax.losses.ratio import capped_exp, token_log_ratio
from alignjax.models import Model
from alignjax.phases.common import Policy, checked_rows, score_tokens
from alignjax.phases.grpo_config import GrpoConfig, RlConfig
from alignjax.phases.rollout_devices import RolloutDevices, Weights
from alignjax.phases.scoring import Rewards
from alignjax.rewards.combine import too_many_failures
from alignjax.rewards.overlap import overlapped_rollout
from alignjax.rewards.rollout import Rollouts, Task, no_scores, rollout
from alignjax.sharding import batch_shards
from alignjax.text import stop_ids
from alignjax.train.loop import StopRunError
from alignjax.train.step import Batch, Metric, over_micro_batches

Tokens = dict[str, np.ndarray]
"""One prompt with its completion: arrays over its tokens."""


class Sampler:
    """Prompts of the data, completions of a model, and their rewards.

    Attributes:
      sampling: of the rollouts.
      devices: those that sample.
      weights: brings the parameters there.
      rewards: a `ScoreFn`; where the config has none, no sample has a score.
      warnings: sentences for the user.
    """

    def __init__(self, config: RlConfig, policy: Policy, mesh: Mesh):
        """Raises: UserError: if prompt and completion exceed the context of a model, and what
        `Rewards` raises."""
        limits, context = config.rollout, policy.model.config.max_position_embeddings
        if limits.max_prompt_tokens + limits.max_tokens > context:
            raise UserError(
                f"rollout.max_prompt_tokens={limits.max_prompt_tokens} and max_tokens="
                f"{limits.max_tokens} exceed the model's context of {context} tokens; lower one"
            )
        if limits.score_early and jax.process_count() > 1:
            raise UserError("rollout.score_early is for a single process: leave it out")
        self._config, self._policy = config, policy
        self.devices = RolloutDevices(limits, mesh)
        self.sampling = Sampling(
            temperature=limits.temperature,
            max_tokens=limits.max_tokens,
            stop_tokens=stop_ids(policy.tokenizer, limits.stop_tokens, policy.eos_ids),
            num_samples=limits.group_size,
        )
        self._train = self._source(config.data.train)
        self._held_out = None if config.data.eval is None else self._source(config.data.eval)
        self.weights = Weights(policy.model, policy.frozen, self.devices)
        self._generate = self._engine(policy.model, self.weights)
        self.rewards: ScoreFn = no_scores
        self.warnings: list[str] = []
        if config.rewards is not None:
            self.rewards = Rewards(
                config.rewards, policy.tokenizer,
                self.devices.mesh if self.devices.is_apart else mesh,
                max_tokens=limits.max_prompt_tokens + limits.max_tokens,
                log_path=Path(config.output_dir) / config.name / "rewards.log",
            )  # fmt: skip
            self.warnings = self.rewards.warnings

    def _source(self, paths: str | list[str]) -> Examples:
        return Examples(open_source(paths), self._config.data.text.fields)

    def records(self) -> RecordIterator[list[Prompt]]:
        """The prompts of each round of sampling."""
        return self._prompts(self._train, self._config.rollout.num_prompts)

    def held_out_prompts(self) -> list[Prompt]:
        """Those of an evaluation, always the same; none without `data.eval`."""
        if self._held_out is None:
            return []
        num = self._config.evaluation.num_problems
        return next(self._prompts(self._held_out, num, shuffle=False, num_epochs=1))

    def _prompts(
        self, source: Examples, num_prompts: int, **order: Any
    ) -> RecordIterator[list[Prompt]]:
        return examples(
            source,
            prompt_encoder(self._config.data.text, self._policy.tokenizer),
            num_prompts=num_prompts,
            prompt_len=self._config.rollout.max_prompt_tokens,
            overlong=self._config.data.overlong,
            seed=self._config.seed,
            **order,
        )

    def __call__(
        self, params: Params, prompts: Sequence[Prompt], key: Array, sampling: Sampling
    ) -> Rollouts:
        """Completions of each prompt by the model with the parameters `params`, and their scores.

        Args:
          params: what trains of the policy.
        """
        tasks = [Task(p.tokens, p.example.reference, p.example.fields) for p in prompts]
        roll: Any = overlapped_rollout if self._config.rollout.score_early else rollout
        return self.devices.run(
            lambda: roll(
                self._generate, self.rewards, self._policy.tokenizer, params, tasks, key, sampling,
                prompt_len=self._config.rollout.max_prompt_tokens,
            )
        )  # fmt: skip

    def one_round(self, params: Params, records: Any, key: Array, step: int) -> list[Rollouts]:
        """A `disaggregated.SampleFn`: as many prompts as one round has."""
        return [self(params, next(records), named_key(key, "rollout", step), self.sampling)]

    def of(self, model: Model) -> "Sampler":
        """The same prompts and rewards, with completions of another model, none of which trains:
        it is called with all that this one computes with."""
        other = copy.copy(self)
        other.weights = Weights(model, None, self.devices)
        other._generate = self._engine(model, other.weights)
        return other

    def _engine(self, model: Model, weights: Weights) -> GenerateFn:
        """A `GenerateFn` of what `weights` takes; what that moves is dropped when it returns."""
        generate = self._bare_engine(self.devices.model(model), self.devices.mesh)
        return lambda params, *args, **options: generate(weights(params), *args, **options)

    def _bare_engine(self, model: Model, mesh: Mesh) -> Any:
        config, limits = self._config, self._config.rollout
        if config.deterministic:
            return make_exact_generate(
                model,
                mesh,
                num_rows=config.rows_per_update // config.data.micro_batches,
                row_len=limits.max_prompt_tokens + limits.max_tokens,
            )
        return make_generate(
            model, mesh=mesh, max_rows=limits.max_rows,
            int8_kv=limits.int8_kv, int8_weights=limits.int8_weights,
        )  # fmt: skip

    def check(self, scores: Sequence[Score]) -> list[str]:
        """Sentences on rewards that failed.

        Raises:
          StopRunError: if more did than `rewards.max_failure_frac` allows.
        """
        if self._config.rewards is None:
            return []
        if reason := too_many_failures(scores, self._config.rewards.max_failure_frac):
            raise StopRunError(reason)
        errors = [score.error for score in scores if score.error is not None]
        if not errors:
            return []
        what = f"{len(errors)} of {len(scores)} samples have no reward and are left out"
        return [f"{what}: {errors[0]}"]


@dataclass(frozen=True)
class Rows:
    """How the sequences of an update lie in its rows; shapes depend on this alone.

    Attributes:
      num_rows: of one update, over all micro-batches and devices.
      num_parts: micro-batches.
      row_len: tokens of a row.
      packed: several sequences may share a row.
      num_sharing: completions that share one copy of their prompt, as branches of a sequence.
    """

    num_rows: int
    num_parts: int
    row_len: int
    packed: bool
    num_sharing: int = 1

    @classmethod
    def of(cls, config: RlConfig, mesh: Mesh) -> "Rows":
        """Raises: UserError: if the rows do not divide over the devices."""
        checked_rows(config.rows_per_update // config.data.micro_batches, mesh)
        row_len = config.rollout.max_prompt_tokens + config.rollout.max_tokens
        packed = config.data.packed and not config.deterministic
        return cls(config.rows_per_update, config.data.micro_batches, row_len, packed)

    @classmethod
    def sharing(cls, config: RlConfig, mesh: Mesh, num_sharing: int) -> "Rows":
        """As `of`, where so many completions of a prompt share a row, which is as long as they may
        be together."""
        limits, total = config.rollout, config.rows_per_update
        own = -(-limits.group_size // num_sharing)  # Rows that a whole group takes.
        # Minibatches hold any part of any group, each part with a last row that is not full.
        spread = -(-(total + limits.num_prompts * (num_sharing - 1)) // num_sharing)
        num_rows = limits.num_prompts * own
        if config.num_minibatches > 1:
            num_rows = min(num_rows, spread)
        unit = config.data.micro_batches * batch_shards(mesh)
        row_len = shared_row_len(limits.max_prompt_tokens, limits.max_tokens, num_sharing)
        return cls(
            -(-num_rows // unit) * unit,
            config.data.micro_batches,
            row_len,
            config.data.packed,
            num_sharing,
        )

    @classmethod
    def shared_where(cls, config: GrpoConfig, mesh: Mesh) -> "Rows":
        """As `of` or, where completions share their prompts, as `sharing`."""
        rows, num_sharing = cls.of(config, mesh), config.num_sharing(mesh)
        return cls.sharing(config, mesh, num_sharing) if num_sharing > 1 else rows

    def pack(self, sequences: Sequence[Tokens], num_updates: int = 1) -> Tokens:
        """[M, R, T] of what so many updates take, longest first (first-fit decreasing).

        Where completions share prompts, also `branches` and, since a segment is then several
        completions, `sequence_ids`.
        """
        if self.num_sharing > 1:
            sequences = share_prompts(sequences, self.num_sharing)
        if self.packed:
            sequences = sorted(sequences, key=lambda one: -len(one["tokens"]))
        packed, num_used = pack(
            sequences,
            num_rows=num_updates * self.num_rows,
            row_len=self.row_len,
            packed=self.packed,
        )
        assert num_used == len(sequences), "as many rows as sequences hold them all"
        if self.num_sharing > 1:
            packed["sequence_ids"] = sequence_ids(packed)
        shape = num_updates * self.num_parts, self.num_rows // self.num_parts, self.row_len
        return {k: v.reshape(shape) for k, v in packed.items()}


def sequence(rollouts: Rollouts, row: int) -> Tokens:
    """A completion after its prompt: `tokens`, `mask` and `old_logps`, [length] each; where it is
    known, also `versions` of the weights that sampled them, -1 on the prompt."""
    out = rollouts.completions
    prompt = rollouts.tasks[row * len(rollouts.tasks) // len(rollouts.samples)].tokens
    length = int(out.lengths[row])
    before = np.zeros(len(prompt), np.float32)
    mask = np.arange(len(prompt) + length) >= len(prompt)
    found = {
        "tokens": np.concatenate([prompt, out.tokens[row, :length]]).astype(np.int32),
        "mask": mask,
        "old_logps": np.concatenate([before, out.logps[row, :length]]),
    }
    if rollouts.version is not None:
        found["versions"] = np.where(mask, rollouts.version, -1).astype(np.int32)
    return found


def make_logps(model: Model, mesh: Mesh, *, temperature: float) -> Callable[[Params, Batch], Array]:
    """params, batch [M, R, T] -> log-probs of its targets [M, R, T], jitted; 0 elsewhere."""
    num_shards = batch_shards(mesh)

    def logps(params: Params, batch: Batch) -> Array:
        def micro(mb: Batch) -> Array:
            return score_tokens(
                model, params, mb,
                num_shards=num_shards, temperature=temperature, with_entropy=False,
            ).logps  # fmt: skip

        return over_micro_batches(micro, batch)

    return jax.jit(logps)


def sampler_metrics(logps: Array, old_logps: Array, mask: Array) -> dict[str, Metric]:
    """How far the log-probs of the trainer, [R, T], are from those recorded while sampling."""
    log_ratio = jax.lax.stop_gradient(token_log_ratio(logps, old_logps, mask))
    difference, ratio = jnp.abs(log_ratio), capped_exp(log_ratio)
    lowest = jnp.min(ratio, initial=jnp.inf, where=mask)
    return {
        "sampling/sampling_logp_difference/mean": token_mean(difference, mask),
        "sampling/sampling_logp_difference/max": Maximum(jnp.max(difference)),
        "sampling/importance_sampling_ratio/min": Minimum(lowest),
        "sampling/importance_sampling_ratio/mean": token_mean(ratio, mask),
        "sampling/importance_sampling_ratio/max": Maximum(jnp.max(ratio, initial=0.0, where=mask)),
    }


def weight_metrics(weights: Array | None, cap: float | None, mask: Array) -> dict[str, Metric]:
    """Of the weights of importance, [R, T], how many are cut; nothing where there are none."""
    if weights is None:
        return {}
    return {"sampling/truncated_frac": token_mean((weights == cap).astype(jnp.float32), mask)}


def sampler_warnings(metrics: Mapping[str, float]) -> list[str]:
    """A sentence if trainer and sampler disagree who should have the same weights."""
    difference = metrics.get("sampling/sampling_logp_difference/max", 0.0)
    if difference <= 1 or metrics.get("rollout/staleness/max", 0.0) > 0:
        return []
    return [
        f"the sampler's log-probs differ from the trainer's by {difference:.3g} nats: with "
        "compute_dtype bfloat16 try float32; in float32 this is a bug, please report it"
    ]


def sample_metrics(rounds: Sequence[Rollouts]) -> dict[str, float]:
    """Lengths, and each part of the reward."""
    lengths = np.concatenate([r.completions.lengths for r in rounds])
    is_truncated = np.concatenate([r.is_truncated for r in rounds])
    terminated = lengths[~is_truncated]
    rewards = np.concatenate([r.rewards for r in rounds])
    is_valid = np.isfinite(rewards)
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": is_truncated.mean(),
        "completions/mean_terminated_length": terminated.mean() if len(terminated) else 0.0,
        "reward": rewards[is_valid].mean() if is_valid.any() else np.nan,
        "num_failed_rewards": (~is_valid).sum(),
    }
    for name in dict.fromkeys(name for r in rounds for name in r.part_names):
        values = np.concatenate([r.part(name) for r in rounds])
        values = values[np.isfinite(values)]
        metrics[f"rewards/{name}/mean"] = values.mean()
        metrics[f"rewards/{name}/std"] = values.std()
    return {name: float(value) for name, value in metrics.items()}


def shown_first(rollouts: Rollouts, num_samples: int) -> list[int]:
    """Rows to show: those whose reward failed, then one of each prompt."""
    failed = [i for i, score in enumerate(rollouts.scores) if score.value is None]
    return [*failed, *range(0, len(rollouts.samples), num_samples)]


def evaluate(
    config: RlConfig, sampling: Sampling, sample: Callable[[Sampling], Rollouts]
) -> tuple[dict[str, float], list[Mapping[str, Any]], dict[str, Rollouts]]:
    """Rewards, their parts and lengths on held-out problems, sampled and greedy.

    Args:
      sample: completions of the held-out prompts.
    Returns:
      metrics under names that begin with eval/, some samples, and the rollouts of each way.
    """
    ways = {}
    if config.evaluation.num_samples:
        ways["sampled"] = (sampling.temperature, config.evaluation.num_samples)
    if config.evaluation.greedy:
        ways["greedy"] = (0.0, 1)
    metrics: dict[str, float] = {}
    shown: list[Mapping[str, Any]] = []
    rollouts = {}
    for way, (temperature, num_samples) in ways.items():
        r = rollouts[way] = sample(
            Sampling(
                temperature=temperature,
                max_tokens=sampling.max_tokens,
                stop_tokens=sampling.stop_tokens,
                num_samples=num_samples,
            )
        )
        valid = r.rewards[np.isfinite(r.rewards)]
        metrics[f"eval/{way}/reward"] = float(valid.mean()) if len(valid) else np.nan
        metrics[f"eval/{way}/num_failed_rewards"] = float(r.rewards.size - len(valid))
        metrics[f"eval/{way}/mean_length"] = float(r.completions.lengths.mean())
        for name in r.part_names:
            metrics[f"eval/{way}/{name}"] = float(np.nanmean(r.part(name)))
        num_shown = min(config.evaluation.num_shown, len(r.tasks))
        chosen = range(0, num_shown * num_samples, num_samples)
        shown += [{"split": f"eval/{way}", **record} for record in r.records(chosen)]
    return metrics, shown, rollouts
