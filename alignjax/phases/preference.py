"""Preferences -> a policy, without a reward model: DPO and its relatives, and KTO."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from alignjax.core.intervals import clustered_interval
from alignjax.core.types import Params, Weighted
from alignjax.data import (
    Element,
    RecordIterator,
    Source,
    comparison_encoder,
)
from alignjax.data.mismatches import Mismatched, mismatch_encoder
from alignjax.phases.common import Policy
from alignjax.phases.comparisons import batches
from alignjax.phases.preference_config import PreferenceConfig
from alignjax.phases.preference_loss import ARRAYS, K, Scorer
from alignjax.phases.preference_step import Learner
from alignjax.phases.reference_logps import cached, default_cache, weights_digest
from alignjax.sharding import fetch, put_batch
from alignjax.train.loop import Collected, Evaluated
from alignjax.train.optim import make_optimizer
from alignjax.train.progress import Progress
from alignjax.train.state import TrainState, create_state
from alignjax.train.step import Batch, finalize, merge


class Preference:
    """Implements `train.loop.Phase`."""

    shown = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "eval/loss",
        "eval/rewards/accuracies",
    )
    """The metrics that a terminal shows."""

    def __init__(self, config: PreferenceConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._policy = Policy(config, mesh)
        self._optimizer = make_optimizer(config.optimizer, config.loop.steps)
        self._learner = Learner(
            config, self._policy, self._optimizer, mesh, shared_prompt=config.data.shared_prompt
        )
        self._progress = Progress(title=config.name)
        specs = {"train": config.data.train, "eval": config.data.eval}
        preferences = {k: config.data.open(spec) for k, spec in specs.items() if spec is not None}
        views = {split: config.view(found) for split, found in preferences.items()}
        self._num_faulty = preferences["train"].num_faulty
        self._num_left_out = views["train"].num_left_out
        self._sources: dict[str, Source] = {**views}
        if self._learner.objective.is_unpaired:
            self._sources = {split: Mismatched(view) for split, view in views.items()}
        self._ref: dict[str, np.ndarray] = {}

    def _rows(self, split: str, **order: Any) -> RecordIterator[dict[str, np.ndarray]]:
        data, context = self._config.data, self._policy.model.config.max_position_embeddings
        encode = comparison_encoder(data.text, self._policy.tokenizer)
        is_unpaired = self._learner.objective.is_unpaired

        def has_room(element: Element) -> bool:
            length = element.num_tokens(shared_prompt=data.shared_prompt)
            return length <= data.row_len and element.longest <= context

        return batches(
            data, self._sources[split], self._policy.tokenizer, self._mesh,
            context=context, num_responses=K, seed=self._config.seed,
            encode=mismatch_encoder(encode, has_room) if is_unpaired else encode,
            **order,
        )  # fmt: skip

    # --- init -----------------------------------------------------------------------------------

    def init(self, key: Array) -> TrainState:
        params = self._policy.init(key)
        if self._learner.objective.reads_reference:
            scorer, weights = self._learner.reference(params)
            digest = weights_digest(
                weights,
                config=scorer.model.config.model_dump(mode="json"),
                compute_dtype=scorer.model.compute_dtype,
                attention=scorer.model.attention,
                length_alpha=scorer.length_alpha,
                device=self._mesh.devices.flat[0].device_kind,
            )
            self._ref = {
                split: self._reference_logps(split, scorer, weights, digest)
                for split in self._sources
            }
        return create_state(
            params, self._optimizer.transform, key, extra=self._learner.first_extra()
        )

    def _reference_logps(
        self, split: str, scorer: Scorer, weights: Params, digest: str
    ) -> np.ndarray:
        """[elements, K]; see `reference_logps.cached`."""
        directory = self._config.cache_dir

        def compute(batch: Mapping[str, np.ndarray]) -> np.ndarray:
            return fetch(self._learner.reference_logps(scorer, weights, self._put(batch)))

        return cached(
            compute,
            functools.partial(self._rows, split, shuffle=False, num_epochs=1),
            len(self._sources[split]),
            K,
            key=digest,
            directory=default_cache() if directory is None else Path(directory).expanduser(),
            progress=self._progress,
        )

    def records(self) -> Any:
        return self._rows("train")

    # --- collect, step --------------------------------------------------------------------------

    def collect(self, state: TrainState, records: Any) -> tuple[TrainState, Collected]:
        batch = next(records)
        return state, Collected(
            batches=[self._prepared("train", batch)],
            num_tokens=int(np.count_nonzero(batch["segment_ids"])),
            metrics={
                "epoch": records.epoch,
                "num_dropped": records.num_dropped,
                "num_faulty": self._num_faulty,
                "num_left_out": self._num_left_out,
            },
        )

    def _prepared(self, split: str, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """The rows on the devices, with what is known of each element."""
        more = {}
        if split in self._ref:
            more["ref_logps"] = np.where(
                batch["ranks"] > 0, self._ref[split][batch["index"]], np.float32(0)
            )
        if self._config.data.prob_field is not None:
            more["preference_prob"] = batch["margins"]
        return self._put({**batch, **more}, *more)

    def _put(self, batch: Mapping[str, np.ndarray], *more: str) -> dict[str, Array]:
        return put_batch({name: batch[name] for name in (*ARRAYS, *more)}, self._mesh, 1)

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        return self._learner.step(state, batch)

    def diagnose(self, metrics: Mapping[str, float]) -> list[str]:
        return []

    # --- evaluate, export -----------------------------------------------------------------------

    def evaluate(self, state: TrainState) -> Evaluated:
        """Loss and metrics over all held-out comparisons, with the 95% interval of the accuracy."""
        if "eval" not in self._sources:
            return Evaluated({})
        sums: dict[str, Any] = {}
        for batch in self._rows("eval", shuffle=False, num_epochs=1):
            new = self._learner.evaluate(state, self._prepared("eval", batch))
            sums = {k: merge(sums[k], new[k]) if sums else new[k] for k in new}
        found = self._learner.finished({k: finalize(v) for k, v in sums.items()})
        metrics = {f"eval/{k}": float(v) for k, v in found.items()}
        low, high = interval(sums["rewards/accuracies"])
        return Evaluated(
            metrics | {"eval/rewards/accuracies_low": low, "eval/rewards/accuracies_high": high}
        )

    def export(self, state: TrainState, path: Path) -> None:
        self._policy.export(state.params, path)


def interval(share: Weighted) -> tuple[float, float]:
    """95% of a share of so many trials."""
    num, hits = round(float(share.weight)), round(float(share.total))
    low, high = clustered_interval(np.arange(num) < hits, 1)
    return float(low), float(high)
