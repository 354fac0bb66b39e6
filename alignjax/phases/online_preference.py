"""Online DPO: the policy samples, a reward says which of its samples is best and which worst, and
any loss of the preference phase learns from the two (arXiv:2402.04792)."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax.core.keys import named_key
from alignjax.core.types import Params
from alignjax.data import Element
from alignjax.data.comparison_rows import pack_elements
from alignjax.data.elements import mismatched
from alignjax.generate import SequenceLogps, make_sequence_logps
from alignjax.phases.common import Policy, checked_rows
from alignjax.phases.disaggregated import make_schedule, staleness_metrics
from alignjax.phases.online_preference_config import OnlineConfig
from alignjax.phases.preference_loss import ARRAYS, K, Scorer
from alignjax.phases.preference_step import Learner
from alignjax.phases.rollouts import Sampler, evaluate, sample_metrics, shown_first
from alignjax.rewards.rollout import Rollouts
from alignjax.sharding import copied, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import make_optimizer
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch


class OnlinePreference:
    """Implements `train.loop.Phase`."""

    shown = (
        "reward", "reward_margin", "rewards/accuracies", "completions/mean_length",
        "eval/sampled/reward", "eval/sampled/kl", "eval/sampled/mean_length",
    )  # fmt: skip
    """The metrics that a terminal shows."""

    def __init__(self, config: OnlineConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        checked_rows(config.rows_per_update // config.data.micro_batches, mesh)
        self._sampler = Sampler(config, self._policy, mesh)
        self._schedule = make_schedule(config, self._sampler, self._sampler.one_round)
        self._optimizer = make_optimizer(
            config.optimizer,
            config.loop.steps * config.algorithm.num_updates * config.num_minibatches,
        )
        self._learner = Learner(
            config, self._policy, self._optimizer, mesh, shared_prompt=config.data.shared_prompt
        )
        self._reference: tuple[Scorer, Params] | None = None
        self._ref_logps: SequenceLogps | None = None

    def init(self, key: Array) -> TrainState:
        params = self._policy.init(key)
        if self._learner.objective.reads_reference:
            scorer, weights = self._learner.reference(params)
            # The step is going to be given the others.
            self._reference = scorer, copied(weights) if weights is params else weights
            rollout = self._config.rollout
            self._ref_logps = make_sequence_logps(
                scorer.model, self._mesh,
                row_len=rollout.max_prompt_tokens + rollout.max_tokens,
                temperature=rollout.temperature,
            )  # fmt: skip
        state = create_state(
            params, self._optimizer.transform, key, extra=self._learner.first_extra()
        )
        return self._schedule.begin(state, params)

    def records(self) -> Any:
        return self._schedule.records(self._sampler.records())

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        """Samples and scores; deterministic in (state, records) as long as the rewards are."""
        (step, _), sampling = state.on_host(), self._sampler.sampling
        state, (found,) = self._schedule(state, state.params, records)
        failed = self._sampler.check(found.scores)
        elements, metrics = best_and_worst(found)
        return state, Collected(
            batches=self._batches(elements, step),
            num_tokens=found.num_tokens,
            metrics=sample_metrics([found])
            | metrics
            | staleness_metrics([found], step)
            | {"epoch": records.epoch, "num_dropped": records.num_dropped},
            samples=found.records(shown_first(found, sampling.num_samples)),
            warnings=[*(self._sampler.warnings if step == 0 else ()), *failed],
        )

    def _batches(self, elements: list[Element], step: int) -> Iterator[Batch]:
        """Minibatches [M, R, T], `num_updates` times over."""
        order = np.arange(len(elements))
        if self._config.num_minibatches > 1:
            order = np.random.default_rng([self._config.seed, step]).permutation(order)
        batches = [
            self._packed([elements[i] for i in chosen])
            for chosen in np.array_split(order, self._config.num_minibatches)
            if len(chosen)
        ]
        for _ in range(self._config.algorithm.num_updates):
            yield from batches

    def _packed(self, elements: list[Element]) -> dict[str, Array]:
        """Rows [M, R, T] on the devices; shapes depend on the config alone."""
        config = self._config
        if self._learner.objective.is_unpaired:
            elements = mismatched(singles(elements), lambda element: True)
        rows, parts = config.rows_per_update, config.data.micro_batches
        packed = pack_elements(
            elements, num_rows=rows, row_len=config.row_len, num_responses=K,
            shared_prompt=config.data.shared_prompt, packed=config.data.packed,
        )  # fmt: skip
        shape = parts, rows // parts
        host = {name: packed[name].reshape(*shape, *packed[name].shape[1:]) for name in ARRAYS}
        batch = put_batch(host, self._mesh, 1)
        if self._reference is not None:
            batch["ref_logps"] = self._learner.reference_logps(*self._reference, batch)
        return batch

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._learner.step(state, batch)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        if not math.isfinite(metrics["reward"]):
            return ["no sample has a reward, so nothing can be learned: see samples.jsonl"]
        if metrics["frac_reward_zero_std"] == 1:
            return [
                f"of no prompt one sample is better than another (mean reward "
                f"{metrics['reward']:.3g}), so nothing can be learned: look at samples.jsonl; try "
                "a larger rollout.group_size, or a reward that tells better from worse"
            ]
        return []

    def evaluate(self, state: TrainState) -> Evaluated:
        """Rewards, their parts and lengths on held-out prompts, sampled and greedy, and the KL of
        what was sampled from the reference."""
        prompts = self._sampler.held_out_prompts()
        if not prompts:
            return Evaluated({})
        step, key = state.on_host()
        key = named_key(key, "eval", step)
        metrics, shown, rollouts = evaluate(
            self._config, self._sampler.sampling,
            lambda s: self._sampler(state.params, prompts, key, s),
        )  # fmt: skip
        if "sampled" in rollouts and self._reference is not None and self._ref_logps is not None:
            found = rollouts["sampled"]
            out, weights = found.completions, self._reference[1]
            own = out.logps.sum(1, dtype=np.float64)
            ref = self._ref_logps(weights, found.token_ids(), out.lengths)
            metrics["eval/sampled/kl"] = float(np.mean(own - ref))
        return Evaluated(metrics, shown)

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)

    def close(self) -> None:
        self._schedule.close()


def best_and_worst(rollouts: Rollouts) -> tuple[list[Element], dict[str, float]]:
    """Of each prompt the sample of the highest reward, and that of the lowest, the first of each;
    prompts whose rewards are all equal, or of which fewer than two have one, are left out.

    Returns:
      Their ids as they were sampled, and metrics.
    """
    rewards, out = rollouts.rewards, rollouts.completions
    highest = np.where(np.isfinite(rewards), rewards, -np.inf).argmax(1)
    lowest = np.where(np.isfinite(rewards), rewards, np.inf).argmin(1)
    size = rewards.shape[1]
    elements, margins = [], []
    for n, (best, worst) in enumerate(zip(highest, lowest, strict=True)):
        margin = rewards[n, best] - rewards[n, worst]
        if not margin > 0:  # Nor is nan.
            continue
        margins.append(margin)
        rows = n * size + best, n * size + worst
        ids = tuple(out.tokens[i, : out.lengths[i]].astype(np.int32) for i in rows)
        prompt = np.asarray(rollouts.tasks[n].tokens, np.int32)
        elements.append(Element(prompt, ids, (1, 2), margin=float(margin)))
    return elements, {
        "reward_margin": float(np.mean(margins)) if margins else 0.0,
        "frac_reward_zero_std": 1.0 - len(elements) / len(rewards),
    }


def singles(pairs: list[Element]) -> list[Element]:
    """Both completions of each pair alone, with their labels: all good ones first, so that the next
    one is of another prompt where there is any."""
    return [
        Element(pair.prompt, (pair.completions[k],), (1,), label=k == 0)
        for k in range(K)
        for pair in pairs
    ]
