"""RL with group-relative advantages: GRPO and its family, as presets over lists of functions."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.types import Maximum, Minimum, Params, Sampling, Weighted
from alignjax.data import (
    Examples,
    RecordIterator,
    examples,
    open_source,
    pack,
    prompt_encoder,
)
from alignjax.generate import make_generate
from alignjax.losses.ratio import capped_exp, token_log_ratio
from alignjax.models import Model
from alignjax.phases.common import Policy, rows_per_process, score_tokens
from alignjax.phases.grpo_config import AlgorithmConfig, GrpoConfig
from alignjax.phases.scoring import Rewards
from alignjax.rewards.combine import too_many_failures
from alignjax.rewards.rollout import Rollouts, Task, rollout
from alignjax.sharding import batch_shards, copied, put_batch
from alignjax.text import stop_ids
from alignjax.train.loop import Collected, Evaluated, StopRunError
from alignjax.train.optim import make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, make_step


def grpo_loss(
    model: Model,
    params: Params,
    batch: Batch,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    max_tokens: int,
    num_shards: int = 1,
) -> tuple[Weighted, Metrics]:
    """Clipped surrogate, plus the KL where the batch has reference log-probs, over token rows."""
    out = score_tokens(model, params, batch, num_shards=num_shards, temperature=temperature)
    mask, old_logps = batch["mask"], batch["old_logps"]
    found = losses.policy_loss(
        algorithm.algorithm,
        out.logps,
        old_logps,
        batch.get("ref_logps"),
        batch["advantages"],
        mask,
        batch["segment_ids"],
        max_len=max_tokens,
    )
    surrogate = found.surrogate
    log_ratio = jax.lax.stop_gradient(token_log_ratio(out.logps, old_logps, mask))
    difference, ratio = jnp.abs(log_ratio), capped_exp(log_ratio)
    assert out.entropies is not None
    metrics = {
        "entropy": losses.token_mean(out.entropies, mask),
        "clip_ratio/low_mean": losses.token_mean(surrogate.is_low.astype(jnp.float32), mask),
        "clip_ratio/high_mean": losses.token_mean(surrogate.is_high.astype(jnp.float32), mask),
        "clip_ratio/region_mean": losses.token_mean(surrogate.is_clipped.astype(jnp.float32), mask),
        "sampling/sampling_logp_difference/mean": losses.token_mean(difference, mask),
        "sampling/sampling_logp_difference/max": Maximum(jnp.max(difference)),
        "sampling/importance_sampling_ratio/min": Minimum(
            jnp.min(ratio, initial=jnp.inf, where=mask)
        ),
        "sampling/importance_sampling_ratio/mean": losses.token_mean(ratio, mask),
        "sampling/importance_sampling_ratio/max": Maximum(jnp.max(ratio, initial=0.0, where=mask)),
    }
    if found.kl is not None:
        metrics["kl"] = losses.token_mean(found.kl, mask)
    return found.loss, metrics


class Grpo:
    """Implements `train.loop.Phase`."""

    # Not the loss, which is about 0 on policy and says nothing (docs/metrics.md).
    shown = (
        "reward", "completions/mean_length", "kl", "eval/sampled/accuracy", "eval/greedy/accuracy",
        "eval/sampled/reward", "eval/sampled/mean_length",
    )  # fmt: skip

    def __init__(self, config: GrpoConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        model, tokenizer = self._policy.model, self._policy.tokenizer
        rollout, algorithm = config.rollout, config.algorithm
        context = model.config.max_position_embeddings
        if rollout.max_prompt_tokens + rollout.max_tokens > context:
            raise UserError(
                f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and max_tokens="
                f"{rollout.max_tokens} exceed the model's context of {context} tokens; lower one"
            )
        rows_per_process(config.rows_per_update // config.data.micro_batches, mesh)
        self._train = Examples(open_source(config.data.train), config.data.text.fields)
        self._eval = (
            None
            if config.data.eval is None
            else Examples(open_source(config.data.eval), config.data.text.fields)
        )
        self._optimizer = make_optimizer(
            config.optimizer,
            config.loop.steps * algorithm.num_updates * algorithm.num_minibatches,
        )
        self._sampling = Sampling(
            temperature=rollout.temperature,
            max_tokens=rollout.max_tokens,
            stop_tokens=stop_ids(tokenizer, rollout.stop_tokens, self._policy.eos_ids),
            num_samples=rollout.group_size,
        )
        self._generate = make_generate(model, mesh=mesh, max_rows=rollout.max_rows)
        log_path = Path(config.output_dir) / config.name / "rewards.log"
        self._score = Rewards(
            config.rewards, tokenizer, mesh,
            max_tokens=rollout.max_prompt_tokens + rollout.max_tokens, log_path=log_path,
        )  # fmt: skip
        # Under LoRA a reference that stays is the base: no second copy of the weights.
        self._reference: Params | None = None
        is_base = self._policy.frozen is not None and not algorithm.reference_every
        reference = self._policy.reference_model if is_base else model
        num_shards = batch_shards(mesh)

        def loss(params: Params, batch: Batch) -> tuple[Weighted, Metrics]:
            return grpo_loss(
                model, params, batch, algorithm,
                temperature=rollout.temperature, max_tokens=rollout.max_tokens,
                num_shards=num_shards,
            )  # fmt: skip

        def ref_logps(params: Params, batch: Batch) -> Array:
            def micro(mb: Batch) -> Array:
                out = score_tokens(
                    reference, params, mb,
                    num_shards=num_shards, temperature=rollout.temperature, with_entropy=False,
                )  # fmt: skip
                return out.logps

            return jax.lax.map(
                lambda mb: jax.lax.cond(
                    jnp.any(mb["mask"]), micro, lambda mb: jnp.zeros(mb["mask"].shape), mb
                ),
                batch,
            )

        self._step = make_step(loss, self._optimizer, self._policy.frozen)
        self._ref_logps = jax.jit(ref_logps)

    # --- init -----------------------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        params = self._policy.init(key)
        reference = None
        if self._config.algorithm.kl_coef > 0:
            if self._config.algorithm.reference_every:
                reference = copied(params)
            elif self._policy.frozen is not None:
                self._reference = self._policy.frozen
            else:
                self._reference = copied(params)
        return create_state(params, self._optimizer.transform, key, reference=reference)

    def records(self) -> Any:
        return self._prompts(self._train, self._config.rollout.num_prompts)

    def _prompts(self, source: Examples, num_prompts: int, **order: Any) -> RecordIterator[Any]:
        return examples(
            source,
            prompt_encoder(self._config.data.text, self._policy.tokenizer),
            num_prompts=num_prompts,
            prompt_len=self._config.rollout.max_prompt_tokens,
            overlong=self._config.data.overlong,
            seed=self._config.seed,
            **order,
        )

    # --- collect --------------------------------------------------------------------------------

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        """Samples, scores, and lays out an iteration's rollouts. Deterministic in (state, records)
        as long as the reward functions are."""
        algorithm, step = self._config.algorithm, int(state.step)
        if state.reference is not None and step and step % algorithm.reference_every == 0:
            state = state._replace(reference=copied(state.params))
        rounds = []
        num_informative = 0
        for number in range(algorithm.max_rounds if algorithm.dynamic_sampling else 1):
            key = named_key(state.key, "rollout", step, number)
            rounds.append(self._rollout(state.params, next(records), key, self._sampling))
            num_informative += int(is_informative(rounds[-1].rewards).sum())
            if num_informative >= self._config.rollout.num_prompts:
                break
        scores = [score for r in rounds for score in r.scores]
        if reason := too_many_failures(scores, self._config.rewards.max_failure_frac):
            raise StopRunError(reason)
        sequences, metrics = self._sequences(state, rounds)
        errors = [score.error for score in scores if score.error is not None]
        warnings = list(self._score.warnings) if step == 0 else []
        if errors:
            what = f"{len(errors)} of {len(scores)} samples have no reward and are left out"
            warnings.append(f"{what}: {errors[0]}")
        # One sample of each prompt, after those whose reward failed.
        shown = [i for i, score in enumerate(rounds[0].scores) if score.value is None]
        shown += range(0, len(rounds[0].samples), self._sampling.num_samples)
        return state, Collected(
            batches=self._batches(state, sequences, step),
            num_tokens=sum(r.num_tokens for r in rounds),
            metrics=self._host_metrics(rounds)
            | metrics
            | {"epoch": records.epoch, "num_dropped": records.num_dropped},
            samples=rounds[0].records(shown),
            warnings=warnings,
        )

    def _rollout(
        self, params: Params, prompts: list[Any], key: Array, sampling: Sampling
    ) -> Rollouts:
        tasks = [Task(p.tokens, p.example.reference, p.example.fields) for p in prompts]
        return rollout(
            self._generate, self._score, self._policy.tokenizer, self._policy.whole(params), tasks,
            key, sampling,
            prompt_len=self._config.rollout.max_prompt_tokens,
        )  # fmt: skip

    def _sequences(
        self, state: TrainState, rounds: list[Rollouts]
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
        """The samples that are trained on, each as arrays over its tokens; and metrics of them."""
        algorithm, size = self._config.algorithm, self._sampling.num_samples
        rewards = np.concatenate([r.rewards for r in rounds])
        is_used = np.isfinite(rewards).any(1)
        if algorithm.dynamic_sampling:
            is_used = is_informative(rewards)
        chosen = np.flatnonzero(is_used)[: self._config.rollout.num_prompts]
        outcomes = self._outcomes(rounds, chosen)
        groups = [(r, i) for r in rounds for i in range(len(r.tasks))]
        places = [(n, g) for n in range(len(chosen)) for g in np.flatnonzero(outcomes.is_valid[n])]
        sequences = []
        for n, g in places:
            r, i = groups[chosen[n]]
            sequences.append(_sequence(r, i * size + g, r.tasks[i].tokens))
        metrics = {}
        if algorithm.kl_in_reward and algorithm.kl_coef and sequences:
            kl = self._kl(state, sequences)
            metrics["kl"] = float(kl.sum() / sum(s["mask"].sum() for s in sequences))
            penalty = np.zeros(outcomes.rewards.shape, np.float32)
            penalty[tuple(np.transpose(places))] = algorithm.kl_coef * kl
            outcomes = outcomes._replace(rewards=outcomes.rewards - penalty)
        advantages = np.asarray(losses.ADVANTAGES[algorithm.advantage](outcomes))
        for place, sequence in zip(places, sequences, strict=True):
            sequence["advantages"] = np.where(sequence["mask"], advantages[place], np.float32(0))
        return sequences, metrics

    def _outcomes(self, rounds: list[Rollouts], chosen: np.ndarray) -> losses.Outcomes:
        """Of the chosen groups of all rounds, always in one shape: what is missing is not valid."""
        config = self._config

        def of_all(values: Callable[[Rollouts], np.ndarray], missing: float) -> np.ndarray:
            found = np.concatenate([values(r) for r in rounds])[chosen]
            width = [(0, config.rollout.num_prompts - len(chosen)), *[(0, 0)] * (found.ndim - 1)]
            return np.pad(found, width, constant_values=missing)

        def parts(r: Rollouts) -> np.ndarray:
            weights = config.rewards.weights.items()
            return np.stack([weight * r.part(name) for name, weight in weights], axis=2)

        rewards = of_all(lambda r: r.rewards, np.nan)
        lengths = of_all(lambda r: r.completions.lengths.reshape(r.rewards.shape), 0)
        is_valid = np.isfinite(rewards)
        if config.algorithm.overlong_frac > 0:
            limit = self._sampling.max_tokens
            penalty = losses.overlong_penalty(
                jnp.asarray(lengths),
                max_len=limit,
                buffer=max(1, round(config.algorithm.overlong_frac * limit)),
            )
            rewards = rewards + np.asarray(penalty)
        arrays = rewards, is_valid, lengths, of_all(parts, 0.0).astype(np.float32)
        return losses.Outcomes(*map(jnp.asarray, arrays))

    def _kl(self, state: TrainState, sequences: list[dict[str, np.ndarray]]) -> np.ndarray:
        """One for each sequence: the KL to the reference, summed over its tokens. float32, nats."""
        config = self._config
        index = [np.full(len(s["tokens"]), n, np.int32) for n, s in enumerate(sequences)]
        packed = self._packed(
            [{**s, "index": i} for s, i in zip(sequences, index, strict=True)],
            config.algorithm.num_minibatches,
        )
        owners = packed.pop("index").reshape(-1)
        batch = put_batch(packed, self._mesh, 1)
        old, ref, mask = (
            x.reshape(-1, x.shape[-1])
            for x in (batch["old_logps"], self._ref_logps(self._ref(state), batch), batch["mask"])
        )
        estimator = losses.KL_ESTIMATORS[config.algorithm.kl_estimator]
        kl = np.asarray(estimator(old, old, ref, mask)).reshape(-1)
        return np.bincount(owners, kl, minlength=len(sequences)).astype(np.float32)

    def _ref(self, state: TrainState) -> Params:
        if state.reference is not None:
            return self._policy.whole(state.reference)
        assert self._reference is not None
        return self._reference

    def _packed(
        self, sequences: list[dict[str, np.ndarray]], num_updates: int = 1
    ) -> dict[str, np.ndarray]:
        """[M, R, T] of what so many updates take. Shapes depend on the config alone."""
        config = self._config
        rows, parts = config.rows_per_update, config.data.micro_batches
        row_len = config.rollout.max_prompt_tokens + config.rollout.max_tokens
        packed, num_used = pack(
            sequences, num_rows=num_updates * rows, row_len=row_len, packed=config.data.packed
        )
        assert num_used == len(sequences), "as many rows as sequences hold them all"
        shape = num_updates * parts, rows // parts, row_len
        return {k: v.reshape(shape) for k, v in packed.items()}

    def _batches(
        self, state: TrainState, sequences: list[dict[str, np.ndarray]], step: int
    ) -> Iterator[Batch]:
        """Minibatches [M, R, T], `num_updates` times over."""
        config, algorithm = self._config, self._config.algorithm
        order = np.arange(len(sequences))
        if algorithm.num_minibatches > 1:
            order = np.random.default_rng([config.seed, step]).permutation(order)
        batches = []
        for chosen in np.array_split(order, algorithm.num_minibatches):
            if not len(chosen):
                continue
            batch = put_batch(self._packed([sequences[i] for i in chosen]), self._mesh, 1)
            if algorithm.kl_coef > 0 and not algorithm.kl_in_reward:
                batch["ref_logps"] = self._ref_logps(self._ref(state), batch)
            batches.append(batch)
        for _ in range(algorithm.num_updates):
            yield from batches

    def _host_metrics(self, rounds: list[Rollouts]) -> dict[str, float]:
        rewards = np.concatenate([r.rewards for r in rounds])
        lengths = np.concatenate([r.completions.lengths for r in rounds])
        is_truncated = np.concatenate([r.is_truncated for r in rounds])
        terminated = lengths[~is_truncated]
        is_valid = np.isfinite(rewards)
        comparable = rewards[is_valid.sum(1) >= 2]
        metrics = {
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": is_truncated.mean(),
            "completions/mean_terminated_length": terminated.mean() if len(terminated) else 0.0,
            "reward": rewards[is_valid].mean() if is_valid.any() else np.nan,
            "reward_std": np.nanstd(comparable, axis=1, ddof=1).mean() if len(comparable) else 0.0,
            "frac_reward_zero_std": 1.0 - is_informative(rewards).mean(),
            "num_failed_rewards": (~is_valid).sum(),
            "num_rounds": len(rounds),
        }
        for name in dict.fromkeys(name for r in rounds for name in r.part_names):
            values = np.concatenate([r.part(name) for r in rounds])
            values = values[np.isfinite(values)]
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std()
        return {name: float(value) for name, value in metrics.items()}

    # --- step, evaluate, export -----------------------------------------------------------------

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._step(state, batch)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        found = []
        if not math.isfinite(metrics["reward"]):
            found.append("no sample has a reward, so nothing can be learned: see samples.jsonl")
        elif metrics["frac_reward_zero_std"] == 1:
            found.append(
                f"in every group all rewards are equal (mean {metrics['reward']:.3g}), so nothing "
                "can be learned: look at samples.jsonl; try easier or harder problems, a larger "
                "rollout.group_size, or a reward that tells better from worse"
            )
        if metrics["completions/clipped_ratio"] == 1:
            found.append(
                f"every completion was cut at rollout.max_tokens={self._sampling.max_tokens}: "
                "raise it, or check that the model knows EOS (rollout.stop_tokens)"
            )
        if metrics.get("kl", 0.0) > 10:
            found.append(
                f"the KL to the reference is {metrics['kl']:.3g} nats per token: lower "
                "optimizer.learning_rate or raise algorithm.kl_coef"
            )
        if metrics.get("sampling/sampling_logp_difference/max", 0.0) > 1:
            found.append(
                "the sampler's log-probs differ from the trainer's by "
                f"{metrics['sampling/sampling_logp_difference/max']:.3g} nats: with compute_dtype "
                "bfloat16 try float32; in float32 this is a bug, please report it"
            )
        return found

    def evaluate(self, state: TrainState) -> Evaluated:
        """Rewards, their parts and lengths on held-out problems, sampled and greedy."""
        config = self._config.evaluation
        if self._eval is None:
            return Evaluated({})
        prompts = next(self._prompts(self._eval, config.num_problems, shuffle=False, num_epochs=1))
        ways = {}
        if config.num_samples:
            ways["sampled"] = (self._sampling.temperature, config.num_samples)
        if config.greedy:
            ways["greedy"] = (0.0, 1)
        metrics: dict[str, float] = {}
        shown: list[Mapping[str, Any]] = []
        for way, (temperature, num_samples) in ways.items():
            sampling = Sampling(
                temperature=temperature,
                max_tokens=self._sampling.max_tokens,
                stop_tokens=self._sampling.stop_tokens,
                num_samples=num_samples,
            )
            key = named_key(state.key, "eval", int(state.step))
            r = self._rollout(state.params, prompts, key, sampling)
            valid = r.rewards[np.isfinite(r.rewards)]
            metrics[f"eval/{way}/reward"] = float(valid.mean()) if len(valid) else np.nan
            metrics[f"eval/{way}/num_failed_rewards"] = float(r.rewards.size - len(valid))
            metrics[f"eval/{way}/mean_length"] = float(r.completions.lengths.mean())
            for name in r.part_names:
                metrics[f"eval/{way}/{name}"] = float(np.nanmean(r.part(name)))
            chosen = range(0, min(config.num_shown, len(prompts)) * num_samples, num_samples)
            shown += [{"split": f"eval/{way}", **record} for record in r.records(chosen)]
        return Evaluated(metrics, shown)

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)


def is_informative(rewards: np.ndarray) -> np.ndarray:
    """[N, G] rewards, nan where failed -> [N] bool: at least two, and not all equal."""
    filled = np.isfinite(rewards)
    highest = np.where(filled, rewards, -np.inf).max(1)
    lowest = np.where(filled, rewards, np.inf).min(1)
    return (filled.sum(1) >= 2) & (highest > lowest)


def _sequence(rollouts: Rollouts, row: int, prompt: np.ndarray) -> dict[str, np.ndarray]:
    out = rollouts.completions
    length = int(out.lengths[row])
    before = np.zeros(len(prompt), np.float32)
    return {
        "tokens": np.concatenate([prompt, out.tokens[row, :length]]).astype(np.int32),
        "mask": np.arange(len(prompt) + length) >= len(prompt),
        "old_logps": np.concatenate([before, out.logps[row, :length]]),
    }
