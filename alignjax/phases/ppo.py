"""PPO for language models: a policy, a critic, a reward, and a price for leaving the reference."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.keys import named_key
from alignjax.core.types import Params, Weighted
from alignjax.data import RecordIterator, sequence_encoder, token_rows, training_source
from alignjax.losses import KlControl
from alignjax.models import Model, lora
from alignjax.phases.common import Policy, checked_rows
from alignjax.phases.critic import CRITICS, Critic, state_values
from alignjax.phases.disaggregated import make_schedule, staleness_metrics
from alignjax.phases.ppo_config import PpoConfig, PtxConfig
from alignjax.phases.ppo_loss import Experience, experience, ppo_loss
from alignjax.phases.ppo_rows import (
    best_of_n,
    diagnose,
    explained_variance,
    mean_sum,
    numbered,
    split,
    with_texts,
)
from alignjax.phases.ppo_state import Extra, PolicyOfPpo, PpoRecords, controlled, trained_scores
from alignjax.phases.rollouts import (
    Rows,
    Sampler,
    Tokens,
    evaluate,
    make_logps,
    sample_metrics,
    sequence,
    shown_first,
)
from alignjax.rewards.rollout import Rollouts
from alignjax.sharding import batch_shards, copied, fetch, placed, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import Optimizer, make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, Step, make_step, over_micro_batches


class Functions(NamedTuple):
    """What the phase compiles, besides the sampler and the rewards."""

    optimizer: Optimizer
    step: Step
    ref_logps: Callable[[Params, Batch], Array]
    logps: Callable[[Params, Batch], Array]
    values: Callable[[Params, Batch], Array]
    """Of {"policy": ..., and the critic's under its name}."""
    experience: Callable[..., Experience]


def make_functions(
    config: PpoConfig, model: Model, critic: Critic, mesh: Mesh, frozen: Params | None = None
) -> Functions:
    """Args: frozen: the base of the policy under LoRA; None: all parameters train."""
    algorithm, temperature = config.algorithm, config.rollout.temperature
    num_shards = batch_shards(mesh)
    optimizer = make_optimizer(
        config.optimizer,
        config.loop.steps * algorithm.num_epochs * algorithm.num_minibatches,
        scales={critic.name: config.critic.learning_rate_scale},
    )

    def loss(params: Params, batch: Batch) -> tuple[Weighted, Metrics]:
        return ppo_loss(
            model, critic, params, batch, algorithm,
            temperature=temperature, num_shards=num_shards,
        )  # fmt: skip

    def values(params: Params, batch: Batch) -> Array:
        def micro(mb: Batch) -> Array:
            rows = mb["tokens"], mb["segment_ids"], mb["positions"]
            hidden, _ = model.apply(params["policy"], *rows)
            return state_values(critic.values(params, mb, hidden))

        return over_micro_batches(micro, batch)

    # Under LoRA the reference is the base: no second copy of the weights.
    reference = model if frozen is None else lora.base(model)
    return Functions(
        optimizer,
        make_step(loss, optimizer, None if frozen is None else {"policy": frozen}),
        make_logps(reference, mesh, temperature=temperature),
        make_logps(model, mesh, temperature=temperature),
        jax.jit(values),
        jax.jit(functools.partial(experience, algorithm)),
    )


class Ppo:
    """Implements `train.loop.Phase`. The params of a state are {"policy": ..., and the critic's
    under the name of its kind}."""

    shown = (
        "reward", "objective/kl", "completions/mean_length", "val/explained_variance",
        "eval/sampled/reward", "eval/sampled/kl", "eval/best_of_n/reward",
    )  # fmt: skip
    exporter = PolicyOfPpo
    """What `alignjax export` writes of a checkpoint."""

    def __init__(self, config: PpoConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        self._rows = Rows.of(config, mesh)
        self._sampler = Sampler(config, self._policy, mesh)
        self._schedule = make_schedule(config, self._sampler, self._sampler.one_round)
        self._critic: Critic = CRITICS[config.critic.trunk](config, self._policy, mesh)
        self._texts = None if config.ptx is None else self._make_texts(config.ptx)
        frozen = self._policy.frozen
        self._reference: Params | None = frozen
        self._ref_sampler = self._sampler
        if frozen is not None:
            self._ref_sampler = self._sampler.of(self._policy.reference_model)
        found = make_functions(config, self._policy.model, self._critic, mesh, frozen)
        self._optimizer, self._step, self._ref_logps, self._logps = found[:4]
        self._values, self._experience = found.values, found.experience
        self._best_of_n: dict[str, float] | None = None

    # --- init -----------------------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        policy = self._policy.init(key)
        critic = self._critic.init(policy, named_key(key, "critic"))
        if self._policy.frozen is None:
            self._reference = copied(policy)
        control = KlControl(jnp.float32(self._config.algorithm.kl_coef))
        state = create_state(
            {"policy": policy, self._critic.name: critic},
            self._optimizer.transform,
            key,
            extra=Extra(control, losses.init_moments()),
        )
        return self._schedule.begin(state, policy)

    def records(self) -> PpoRecords:
        prompts = self._schedule.records(self._sampler.records())
        return PpoRecords(prompts, None if self._texts is None else self._texts())

    def _make_texts(self, ptx: PtxConfig) -> Callable[[], RecordIterator[Any]]:
        """What gives the rows of texts for each update in turn."""
        return functools.partial(
            token_rows,
            training_source(ptx.train, ptx.text),
            sequence_encoder(ptx.text, self._policy.tokenizer),
            num_micro_batches=self._rows.num_parts,
            rows=checked_rows(ptx.rows, self._mesh),
            row_len=self._rows.row_len,
            overlong=ptx.overlong,
            seed=self._config.seed,
        )

    def _whole(self, params: Params) -> dict[str, Any]:
        return {**params, "policy": self._policy.whole(params["policy"])}

    # --- collect --------------------------------------------------------------------------------

    def collect(self, state: TrainState, records: PpoRecords) -> tuple[TrainState, Collected]:
        """Samples, scores, and makes advantages of an iteration's rollouts. Deterministic in
        (state, records) as long as the rewards are."""
        (step, _), params = state.on_host(), self._whole(state.params)
        algorithm, sampling = self._config.algorithm, self._sampler.sampling
        state, (rollouts,) = self._schedule(state, state.params["policy"], records.prompts)
        warnings = list(self._sampler.warnings) if step == 0 else []
        warnings += self._sampler.check(rollouts.scores)
        metrics = sample_metrics([rollouts])
        metrics["val/num_eos_tokens"] = float((~rollouts.is_truncated).sum())
        control, moments = fetch(state.extra)
        moments, scores = trained_scores(algorithm, moments, rollouts)
        chosen = np.flatnonzero(np.isfinite(scores))
        sequences = [sequence(rollouts, int(i)) for i in chosen]
        if sequences:
            metrics |= self._add_experience(sequences, scores[chosen], params, control.kl_coef)
            kl = metrics["objective/kl"]
            control = controlled(algorithm, control, kl, len(sequences))
        new = Extra(control, moments)
        extra = jax.tree.map(lambda x, old: placed(np.asarray(x), old.sharding), new, state.extra)
        texts = [next(records.texts) for _ in range(self._num_updates)] if records.texts else []
        return state._replace(extra=extra), Collected(
            batches=self._batches(sequences, texts, step),
            num_tokens=rollouts.num_tokens,
            metrics=metrics
            | staleness_metrics([rollouts], step)
            | {"epoch": records.prompts.epoch, "num_dropped": records.prompts.num_dropped},
            samples=rollouts.records(shown_first(rollouts, sampling.num_samples)),
            warnings=warnings,
        )

    def _add_experience(
        self, sequences: list[Tokens], scores: np.ndarray, params: Params, kl_coef: Array
    ) -> dict[str, float]:
        """Adds `old_values`, `returns` and `advantages` to each sequence; returns what was seen."""
        packed = self._rows.pack(numbered(sequences, scores), self._config.num_minibatches)
        index = packed.pop("index")
        batch = put_batch(packed, self._mesh, 1)
        own: dict[str, np.ndarray] = {}
        if self._config.algorithm.old_logps == "trainer":
            batch["sampler_logps"] = batch["old_logps"]
            batch["old_logps"] = self._logps(params["policy"], batch)
            own = fetch({name: batch[name] for name in ("old_logps", "sampler_logps")})
        ref_logps, old_values = self._ref_logps(self._ref, batch), self._values(params, batch)
        flat = [
            x.reshape(-1, x.shape[-1])
            for x in (batch["old_logps"], ref_logps, old_values, batch["scores"], batch["mask"],
                      batch["segment_ids"])
        ]  # fmt: skip
        found = fetch(self._experience(*flat, kl_coef))
        arrays = {**found._asdict(), "old_values": fetch(old_values), **own}
        by_sequence = split(arrays, packed, index)
        kl = by_sequence.pop("kl")
        for name, parts in by_sequence.items():
            for one, part in zip(sequences, parts, strict=True):
                one[name] = np.where(one["mask"], part, np.float32(0))
        mean_kl = mean_sum(kl)
        price = float(kl_coef)
        non_score = -price * mean_kl
        mask = packed["mask"].reshape(found.returns.shape)
        returns, values = found.returns[mask], arrays["old_values"].reshape(mask.shape)[mask]
        return {
            "objective/kl": mean_kl,
            "objective/entropy": -mean_sum([one["old_logps"] for one in sequences]),
            "objective/non_score_reward": non_score,
            "objective/scores": float(scores.mean()),
            "objective/rlhf_reward": float(scores.mean()) + non_score,
            "kl_coef": price,
            "val/explained_variance": explained_variance(returns, values),
        }

    @property
    def _ref(self) -> Params:
        assert self._reference is not None, "init comes first"
        return self._reference

    @property
    def _num_updates(self) -> int:
        return self._config.algorithm.num_epochs * self._config.num_minibatches

    def _batches(
        self, sequences: list[Tokens], texts: Sequence[Tokens], step: int
    ) -> Iterator[Batch]:
        """Minibatches [M, R, T], in another order in each epoch."""
        config = self._config
        following = iter(texts)
        for epoch in range(config.algorithm.num_epochs):
            order = np.random.default_rng([config.seed, step, epoch]).permutation(len(sequences))
            for chosen in np.array_split(order, config.num_minibatches):
                if not len(chosen):
                    continue
                rows = self._rows.pack([sequences[i] for i in chosen])
                if texts:
                    rows = with_texts(rows, next(following))
                yield put_batch(rows, self._mesh, 1)

    # --- step, evaluate, export -----------------------------------------------------------------

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._step(state, batch)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        return diagnose(self._config.algorithm, self._sampler.sampling, metrics)

    def evaluate(self, state: TrainState) -> Evaluated:
        """Rewards and lengths on held-out problems, sampled and greedy, the KL of what was sampled
        from the first policy, and best of n of that one."""
        config, sampling = self._config, self._sampler.sampling
        prompts = self._sampler.held_out_prompts()
        if not prompts:
            return Evaluated({})
        params = state.params["policy"]
        step, key_of_run = state.on_host()
        key = named_key(key_of_run, "eval", step)
        metrics, shown, rollouts = evaluate(
            config, sampling, lambda s: self._sampler(params, prompts, key, s)
        )
        if "sampled" in rollouts:
            metrics["eval/sampled/kl"] = self._mean_kl(rollouts["sampled"])
        if (n := config.evaluation.best_of_n) and self._best_of_n is None:
            # Of the first policy, always the same: once in a process is enough.
            r = self._ref_sampler(
                self._ref, prompts, named_key(key_of_run, "best_of_n"),
                dataclasses.replace(sampling, num_samples=n),
            )  # fmt: skip
            self._best_of_n = best_of_n(r)
        return Evaluated(metrics | (self._best_of_n or {}), shown)

    def _mean_kl(self, rollouts: Rollouts) -> float:
        """The KL from the first policy, nats for each completion, by k1."""
        sequences = [sequence(rollouts, i) for i in range(len(rollouts.samples))]
        num_updates = -(-len(sequences) // self._rows.num_rows)
        packed = self._rows.pack(sequences, num_updates)
        ref_logps = fetch(self._ref_logps(self._ref, put_batch(packed, self._mesh, 1)))
        difference = np.where(packed["mask"], packed["old_logps"] - ref_logps, 0.0)
        return float(difference.sum(dtype=np.float64) / len(sequences))

    def export(self, state: TrainState, path: Path) -> None:
        """The policy; and the critic beside it, in `critic`."""
        self._critic.export(state.params[self._critic.name], path.with_name("critic"))
        self._policy.export(state.params["policy"], path)

    def close(self) -> None:
        self._schedule.close()
