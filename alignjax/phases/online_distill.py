"""On-policy distillation: the student samples, and learns what the teacher would have said at each
of its own tokens. Source: arXiv:2306.13649 (GKD, all of the data sampled by the student)."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax import losses
from alignjax.core.errors import UserError
from alignjax.core.keys import named_key
from alignjax.core.types import Params, Weighted
from alignjax.models import Model
from alignjax.models.lora import combine
from alignjax.phases.common import Policy, score_hidden, score_tokens
from alignjax.phases.corpus import means
from alignjax.phases.disaggregated import make_schedule, staleness_metrics
from alignjax.phases.online_distill_config import OnlineDistillConfig
from alignjax.phases.rollouts import (
    Rows,
    Sampler,
    Tokens,
    evaluate,
    make_logps,
    sample_metrics,
    sampler_metrics,
    sequence,
    shown_first,
)
from alignjax.phases.teacher import (
    DivergenceConfig,
    Pair,
    compared,
    load_teacher,
    with_teacher,
)
from alignjax.rewards.rollout import Rollouts
from alignjax.sharding import batch_shards, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, Metrics, make_evaluate, make_step


class OnlineDistill:
    """Implements `train.loop.Phase`."""

    shown = (
        "loss", "completions/mean_length", "eval/sampled/reverse_kl", "eval/sampled/accuracy",
        "eval/greedy/accuracy",
    )  # fmt: skip
    """The metrics that a terminal shows."""

    def __init__(self, config: OnlineDistillConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        self._layout = Rows.of(config, mesh)
        self._sampler = Sampler(config, self._policy, mesh)
        self._schedule = make_schedule(config, self._sampler, self._sampler.one_round)
        self._teacher = load_teacher(config.teacher, self._policy, mesh, self._layout.row_len)
        check_width(self._policy.model, self._teacher.model)
        pair = Pair.of(self._policy, self._teacher, mesh)
        self._both = with_teacher(self._policy, self._teacher)
        temperature = config.rollout.temperature
        self._optimizer = make_optimizer(
            config.optimizer,
            config.loop.steps * config.algorithm.num_updates * config.num_minibatches,
        )
        self._is_sampled = config.divergence.kind == "sampled_reverse_kl"
        self._teacher_logps = make_logps(self._teacher.model, mesh, temperature=temperature)
        if self._is_sampled:
            loss = functools.partial(
                sampled_loss, self._policy.model, temperature, batch_shards(mesh)
            )
            self._step = make_step(loss, self._optimizer, self._policy.frozen)
            measured = DivergenceConfig(kind="reverse_kl")
        else:
            loss = functools.partial(student_loss, pair, config.divergence, temperature)
            self._step = make_step(loss, self._optimizer, self._both)
            measured = config.divergence
        self._evaluate = make_evaluate(functools.partial(compared, pair, measured))

    def init(self, key: Array) -> TrainState:
        params = self._policy.init(key)
        state = create_state(params, self._optimizer.transform, key)
        return self._schedule.begin(state, params)

    def records(self) -> Any:
        return self._schedule.records(self._sampler.records())

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        """Samples, and asks the teacher where that is done before the updates. Deterministic in
        (state, records)."""
        (step, _), sampling = state.on_host(), self._sampler.sampling
        state, (found,) = self._schedule(state, state.params, records)
        failed = self._sampler.check(found.scores)
        return state, Collected(
            batches=self._batches(_sequences(found), step),
            num_tokens=found.num_tokens,
            metrics=self._told(sample_metrics([found]))
            | staleness_metrics([found], step)
            | {"epoch": records.epoch, "num_dropped": records.num_dropped},
            samples=found.records(shown_first(found, sampling.num_samples)),
            warnings=[*(self._sampler.warnings if step == 0 else ()), *failed],
        )

    def _batches(self, sequences: list[Tokens], step: int) -> Iterator[Batch]:
        """Minibatches [M, R, T], `num_updates` times over."""
        config = self._config
        order = np.arange(len(sequences))
        if config.num_minibatches > 1:
            order = np.random.default_rng([config.seed, step]).permutation(order)
        batches = []
        for chosen in np.array_split(order, config.num_minibatches):
            batch = put_batch(self._layout.pack([sequences[i] for i in chosen]), self._mesh, 1)
            if self._is_sampled:
                batch["teacher_logps"] = self._teacher_logps(self._teacher.params, batch)
            batches.append(batch)
        for _ in range(config.algorithm.num_updates):
            yield from batches

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._step(state, batch)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        if metrics["completions/clipped_ratio"] == 1:
            return [
                f"every completion was cut at rollout.max_tokens="
                f"{self._sampler.sampling.max_tokens}: raise it, or begin with a student that ends "
                "its answers (phase: sft or distill)"
            ]
        return []

    def evaluate(self, state: TrainState) -> Evaluated:
        """Both KL divergences to the teacher, per token of what the student samples to held-out
        prompts; rewards and lengths, sampled and greedy."""
        prompts = self._sampler.held_out_prompts()
        if not prompts:
            return Evaluated({})
        step, key = state.on_host()
        key = named_key(key, "eval", step)
        metrics, shown, rollouts = evaluate(
            self._config, self._sampler.sampling,
            lambda s: self._sampler(state.params, prompts, key, s),
        )  # fmt: skip
        metrics = self._told(metrics)
        if "sampled" in rollouts:
            metrics |= self._compared(state.params, rollouts["sampled"])
        return Evaluated(metrics, shown)

    def _compared(self, params: Params, rollouts: Rollouts) -> dict[str, float]:
        """How far the student is from the teacher on its own samples."""
        sequences = _sequences(rollouts)
        packed = self._layout.pack(sequences, -(-len(sequences) // self._layout.num_rows))
        batch = put_batch(packed, self._mesh, 1)
        _, found = self._evaluate(combine(self._both, params), batch)
        kls = means([{kind: found[kind] for kind in ("forward_kl", "reverse_kl")}])
        return {name.replace("eval/", "eval/sampled/"): value for name, value in kls.items()}

    def _told(self, metrics: dict[str, float]) -> dict[str, float]:
        """Without those of rewards, where there are none."""
        is_scored = self._config.rewards is not None
        return {name: value for name, value in metrics.items() if is_scored or "reward" not in name}

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)

    def close(self) -> None:
        self._schedule.close()


def check_width(student: Model, teacher: Model) -> None:
    """Raises: UserError: if the student can sample what the teacher cannot read."""
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours > theirs:
        raise UserError(
            f"teacher.path: the teacher has {theirs} rows of embeddings and the student {ours}, so "
            "that it may sample ids which the teacher does not have; teach it on given texts "
            "(phase: distill), or cut its padding"
        )


def _sequences(rollouts: Rollouts) -> list[Tokens]:
    """All that was sampled; what a reward says of it, or fails to say, has no part in this."""
    return [sequence(rollouts, i) for i in range(len(rollouts.samples))]


def student_loss(
    pair: Pair, config: DivergenceConfig, temperature: float, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """The divergence per sampled token, in nats, over token rows [R, T].

    There is no gradient through the sampling: the tokens are given.

    Args:
      temperature: of the sampler, for the metrics that compare it with the trainer.
    Source: arXiv:2306.13649 eq. 2 (GKD).
    """
    mask = batch["mask"]
    reading = pair.read(params, batch)
    found = reading.divergence(config.kind, mask, temperature=config.temperature, **config.options)
    out = score_hidden(
        pair.student, reading.params, reading.hidden, batch,
        num_shards=pair.num_shards, temperature=temperature,
    )  # fmt: skip
    return losses.token_mean(found, mask), _metrics(out, batch)


def sampled_loss(
    model: Model, temperature: float, num_shards: int, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """-min(r A, clip(r) A) per sampled token, A = log p_teacher - log p_old: a policy gradient that
    lowers the reverse KL, over token rows [R, T]. Its first value is an estimate of that KL.

    Source: K. Lu, "On-Policy Distillation" (2025).
    """
    mask, old_logps = batch["mask"], batch["old_logps"]
    out = score_tokens(model, params, batch, num_shards=num_shards, temperature=temperature)
    advantages = losses.distillation_advantage(old_logps, batch["teacher_logps"], mask)
    surrogate = losses.ppo_clip(out.logps, old_logps, advantages, mask)
    return losses.token_mean(surrogate.loss, mask), _metrics(out, batch)


def _metrics(out: losses.TokenLogps, batch: Batch) -> Metrics:
    assert out.entropies is not None
    return {
        "entropy": losses.token_mean(out.entropies, batch["mask"]),
        **sampler_metrics(out.logps, batch["old_logps"], batch["mask"]),
    }
