"""RL with group-relative advantages: GRPO and its family, as presets over lists of functions."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.keys import named_key
from alignjax.core.types import Params, Sampling, Weighted
from alignjax.models import Model, lora
from alignjax.phases.common import Policy, score_tokens
from alignjax.phases.disaggregated import make_schedule, staleness_metrics
from alignjax.phases.grpo_config import AlgorithmConfig, GrpoConfig
from alignjax.phases.rollouts import (
    Rows,
    Sampler,
    evaluate,
    make_logps,
    sample_metrics,
    sampler_metrics,
    sampler_warnings,
    sequence,
    shown_first,
    weight_metrics,
)
from alignjax.rewards.rollout import Rollouts
from alignjax.sharding import batch_shards, copied, fetch, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import Optimizer, make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, Step, make_step


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
        batch.get("sequence_ids", batch["segment_ids"]),
        max_len=max_tokens,
        rollout_logp=batch.get("sampler_logps"),
    )
    surrogate = found.surrogate
    assert out.entropies is not None
    metrics = {
        "entropy": losses.token_mean(out.entropies, mask),
        "clip_ratio/low_mean": losses.token_mean(surrogate.is_low.astype(jnp.float32), mask),
        "clip_ratio/high_mean": losses.token_mean(surrogate.is_high.astype(jnp.float32), mask),
        "clip_ratio/region_mean": losses.token_mean(surrogate.is_clipped.astype(jnp.float32), mask),
        **sampler_metrics(out.logps, batch.get("sampler_logps", old_logps), mask),
        **weight_metrics(found.weights, algorithm.importance_cap, mask),
    }
    if found.kl is not None:
        metrics["kl"] = losses.token_mean(found.kl, mask)
    return found.loss, metrics


class Functions(NamedTuple):
    """What the phase compiles, besides the sampler and the rewards."""

    optimizer: Optimizer
    step: Step
    ref_logps: Callable[[Params, Batch], Array]
    logps: Callable[[Params, Batch], Array]
    has_joint_reference: bool
    """The reference's log-probs are computed in the step, beside those of the policy."""


def make_functions(
    config: GrpoConfig, model: Model, mesh: Mesh, frozen: Params | None = None
) -> Functions:
    """Args: frozen: the base under LoRA; None: all parameters train."""
    algorithm, temperature = config.algorithm, config.rollout.temperature
    optimizer = make_optimizer(
        config.optimizer,
        config.loop.steps * algorithm.num_updates * algorithm.num_minibatches,
    )
    # Under LoRA a reference that stays is the base: no second copy of the weights.
    is_base = frozen is not None and not algorithm.reference_every
    reference = lora.base(model) if is_base else model
    # And its log-probs are computed beside those of the policy, unless they are read twice.
    has_joint_reference = is_base and algorithm.has_kl_in_loss and algorithm.num_updates == 1
    num_shards = batch_shards(mesh)

    def loss(params: Params, batch: Batch) -> tuple[Weighted, Metrics]:
        if has_joint_reference:
            _, base = lora.split(params)
            found = score_tokens(
                reference, base, batch,
                num_shards=num_shards, temperature=temperature, with_entropy=False,
            )  # fmt: skip
            batch = {**batch, "ref_logps": jax.lax.stop_gradient(found.logps)}
        return grpo_loss(
            model, params, batch, algorithm,
            temperature=temperature, max_tokens=config.rollout.max_tokens, num_shards=num_shards,
        )  # fmt: skip

    return Functions(
        optimizer,
        make_step(loss, optimizer, frozen),
        make_logps(reference, mesh, temperature=temperature),
        make_logps(model, mesh, temperature=temperature),
        has_joint_reference,
    )


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
        self._rows = Rows.shared_where(config, mesh)
        self._sampler = Sampler(config, self._policy, mesh)
        self._sampling = self._sampler.sampling
        self._schedule = make_schedule(config, self._sampler, self._rounds)
        self._reference: Params | None = None
        found = make_functions(config, self._policy.model, mesh, self._policy.frozen)
        self._optimizer, self._step, self._ref_logps, self._logps, self._has_joint_reference = found

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
        state = create_state(params, self._optimizer.transform, key, reference=reference)
        return self._schedule.begin(state, params)

    def records(self) -> Any:
        return self._schedule.records(self._sampler.records())

    # --- collect --------------------------------------------------------------------------------

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        """Samples, scores, and lays out an iteration's rollouts. Deterministic in (state, records)
        as long as the reward functions are."""
        algorithm, (step, _) = self._config.algorithm, state.on_host()
        if state.reference is not None and step and step % algorithm.reference_every == 0:
            state = state._replace(reference=copied(state.params))
        state, rounds = self._schedule(state, state.params, records)
        failed = self._sampler.check([score for r in rounds for score in r.scores])
        sequences, metrics = self._sequences(state, rounds)
        warnings = [*(self._sampler.warnings if step == 0 else ()), *failed]
        shown = shown_first(rounds[0], self._sampling.num_samples)
        return state, Collected(
            batches=self._batches(state, sequences, step),
            num_tokens=sum(r.num_tokens for r in rounds),
            metrics=self._host_metrics(rounds)
            | staleness_metrics(rounds, step)
            | metrics
            | {"epoch": records.epoch, "num_dropped": records.num_dropped},
            samples=rounds[0].records(shown),
            warnings=warnings,
        )

    def _rounds(self, params: Params, records: Any, key: Array, step: int) -> list[Rollouts]:
        """What iteration `step` samples, one round after another until it has enough."""
        algorithm = self._config.algorithm
        rounds: list[Rollouts] = []
        num_informative = 0
        for number in range(algorithm.max_rounds if algorithm.dynamic_sampling else 1):
            of_round = named_key(key, "rollout", step, number)
            rounds.append(self._rollout(params, next(records), of_round, self._sampling))
            num_informative += int(is_informative(rounds[-1].rewards).sum())
            if num_informative >= self._config.rollout.num_prompts:
                break
        return rounds

    def _rollout(
        self, params: Params, prompts: list[Any], key: Array, sampling: Sampling
    ) -> Rollouts:
        return self._sampler(params, prompts, key, sampling)

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
            sequences.append(sequence(r, i * size + g))
        metrics = {}
        if algorithm.kl_in_reward and algorithm.kl_coef and sequences:
            kl = self._kl(state, sequences)
            metrics["kl"] = float(kl.sum() / sum(s["mask"].sum() for s in sequences))
            penalty = np.zeros(outcomes.rewards.shape, np.float32)
            penalty[tuple(np.transpose(places))] = algorithm.kl_coef * kl
            outcomes = outcomes._replace(rewards=outcomes.rewards - penalty)
        advantages = np.asarray(losses.ADVANTAGES[algorithm.advantage](outcomes))
        for place, one in zip(places, sequences, strict=True):
            one["advantages"] = np.where(one["mask"], advantages[place], np.float32(0))
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
            # A reward that a prompt does not get says nothing about its samples.
            found = [weight * np.nan_to_num(r.part(name)) for name, weight in weights]
            return np.stack(found, axis=2)

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
        packed = self._rows.pack(
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
        kl = fetch(estimator(old, old, ref, mask)).reshape(-1)
        return np.bincount(owners, kl, minlength=len(sequences)).astype(np.float32)

    def _ref(self, state: TrainState) -> Params:
        if state.reference is not None:
            return self._policy.whole(state.reference)
        assert self._reference is not None
        return self._reference

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
            batch = put_batch(self._rows.pack([sequences[i] for i in chosen]), self._mesh, 1)
            if algorithm.old_logps == "trainer":
                batch["sampler_logps"] = batch["old_logps"]
                batch["old_logps"] = self._logps(self._policy.whole(state.params), batch)
            if algorithm.has_kl_in_loss and not self._has_joint_reference:
                batch["ref_logps"] = self._ref_logps(self._ref(state), batch)
            batches.append(batch)
        for _ in range(algorithm.num_updates):
            yield from batches

    def _host_metrics(self, rounds: list[Rollouts]) -> dict[str, float]:
        rewards = np.concatenate([r.rewards for r in rounds])
        is_valid = np.isfinite(rewards)
        comparable = rewards[is_valid.sum(1) >= 2]
        spread = np.nanstd(comparable, axis=1, ddof=1).mean() if len(comparable) else 0.0
        return sample_metrics(rounds) | {
            "reward_std": float(spread),
            "frac_reward_zero_std": float(1.0 - is_informative(rewards).mean()),
            "num_rounds": float(len(rounds)),
        }

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
        return found + sampler_warnings(metrics)

    def evaluate(self, state: TrainState) -> Evaluated:
        """Rewards, their parts and lengths on held-out problems, sampled and greedy."""
        prompts = self._sampler.held_out_prompts()
        if not prompts:
            return Evaluated({})
        step, key = state.on_host()
        key = named_key(key, "eval", step)
        metrics, shown, _ = evaluate(
            self._config, self._sampling, lambda s: self._rollout(state.params, prompts, key, s)
        )
        return Evaluated(metrics, shown)

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)

    def close(self) -> None:
        self._schedule.close()


def is_informative(rewards: np.ndarray) -> np.ndarray:
    """[N, G] rewards, nan where failed -> [N] bool: at least two, and not all equal."""
    filled = np.isfinite(rewards)
    highest = np.where(filled, rewards, -np.inf).max(1)
    lowest = np.where(filled, rewards, np.inf).min(1)
    return (filled.sum(1) >= 2) & (highest > lowest)
