"""RewardConfig -> one ScoreFn: functions in worker processes, models on the devices, judges."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.hub import resolve
from alignjax.core.precision import compute_dtype
from alignjax.core.processes import gather
from alignjax.core.types import Sample, Score
from alignjax.data import pack
from alignjax.models import load_reward
from alignjax.phases.judge_reward import JudgeReward
from alignjax.rewards.combine import RewardConfig, RewardModelConfig, add_models, names_for
from alignjax.rewards.plain import short
from alignjax.rewards.pool import RewardPool
from alignjax.sharding import batch_shards, fetch, put_batch
from alignjax.text import HFTokenizer, load_tokenizer

MOMENTS = "reward.json"
"""{"mean", "std", "num"} of a reward model's scores on reference responses."""
_SHORTEST_ROW = 64
_ROW_TOKENS = 4096
"""Tokens of the rows that one device scores at once, unless a single row has more."""


class Rewards:
    """A `ScoreFn`: the weighted sum of all rewards of a config. A context manager.

    Attributes:
      warnings: sentences for the user.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: HFTokenizer,
        mesh: Mesh,
        *,
        max_tokens: int | None = None,
        log_path: Path | None = None,
    ):
        """Args:
          tokenizer: the policy's.
          mesh: where reward models lie and are computed.
          max_tokens: of prompt and completion together, at most; None: not known yet.
          log_path: as of `RewardPool`; beside it judges keep their answers.
        Raises:
          UserError: if a function, model or judge cannot be loaded, a model has another tokenizer,
            or a context of fewer than `max_tokens`.
        """
        self.config = config
        self._models = {
            name: RewardModel(name, model, tokenizer, mesh) for name, model in config.models.items()
        }
        for model in self._models.values():
            model.check_context(max_tokens or 0)
        self.warnings = [w for model in self._models.values() for w in model.warnings]
        folder = None if log_path is None else log_path.parent
        self._judges: dict[str, JudgeReward] = {}
        self._pool: RewardPool | None = None
        try:
            for name, judge in config.judges.items():
                self._judges[name] = JudgeReward(name, judge, mesh, folder)
            if config.functions:
                only_functions = config.model_copy(update={"models": {}, "judges": {}})
                self._pool = RewardPool(only_functions, log_path=log_path)
        except BaseException:
            self.close()
            raise

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in order. A sample that gets no reward at all has failed."""
        scores = [Score(0.0)] * len(samples) if self._pool is None else self._of_functions(samples)
        names: list[list[str]] = []
        for i, sample in enumerate(samples):
            try:
                names.append(names_for(self.config.by_name, sample.fields))
                why = "" if names[i] else f"no reward is for {_named(sample)}"
            except ValueError as error:
                names.append([])
                why = str(error)
            if why:
                scores[i] = Score(None, error=f"{why}; prompt {short(sample.prompt)}")
        by_model: list[dict[str, Score]] = [{} for _ in samples]
        for name, model in (self._models | self._judges).items():
            chosen = [i for i, given in enumerate(names) if name in given]
            for i, score in zip(chosen, model([samples[i] for i in chosen]), strict=True):
                by_model[i][name] = score
        return [
            add_models(self.config, score, found)
            for score, found in zip(scores, by_model, strict=True)
        ]

    def _of_functions(self, samples: Sequence[Sample]) -> list[Score]:
        """Of several processes each asks for its part of the samples, and gets the others' told."""
        assert self._pool is not None
        first, number = jax.process_index(), jax.process_count()
        own = self._pool(samples[first::number])
        told = gather([(score.value, dict(score.parts), score.error) for score in own])
        scores = [Score(0.0)] * len(samples)
        for process, found in enumerate(told):
            scores[process::number] = [Score(*one) for one in found]
        return scores

    def close(self) -> None:
        for judge in self._judges.values():
            judge.close()
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RewardModel:
    """A `ScoreFn`: the score, normalised and squashed as its config says, that a model gives to the
    ids that were sampled.

    It is read at the last real token, which is the stop token where one was sampled. Compiled once
    for each row length of the ladder 64, 128, 256, ...
    """

    def __init__(self, name: str, config: RewardModelConfig, tokenizer: HFTokenizer, mesh: Mesh):
        """Raises: UserError: if it cannot be read, or its tokenizer is not the policy's."""
        check_same_ids(f"rewards.models.{name}.path", config.path, tokenizer)
        dtype = compute_dtype(config.compute_dtype, mesh.devices.flat[0].platform)
        self._model, self.params = load_reward(config.path, mesh=mesh, compute_dtype=dtype)
        self._where = f"reward model {name!r} ({config.path})"
        self._mean, self._std, self.warnings = moments(self._where, config)
        self._squash = config.squash
        self._mesh = mesh
        self._apply = jax.jit(self._model.apply)

    @property
    def model(self) -> Any:
        """The `ScalarModel` that `params` are of."""
        return self._model

    def check_context(self, num_tokens: int) -> None:
        """Raises: UserError: if so many tokens do not fit into its context."""
        context = self._model.decoder.config.max_position_embeddings
        if num_tokens > context:
            raise UserError(
                f"{self._where}: a prompt and its completion have up to {num_tokens} tokens, but "
                f"its context has {context}; lower rollout.max_prompt_tokens or max_tokens"
            )

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample; one that is not finite is a failed reward."""
        texts = [_ids(sample) for sample in samples]
        context = self._model.decoder.config.max_position_embeddings
        fits = [i for i, ids in enumerate(texts) if 0 < len(ids) <= context]
        raw = np.full(len(samples), np.nan)
        if fits:
            raw[fits] = self.score_ids([texts[i] for i in fits])
        return [self._score(*one) for one in zip(samples, texts, raw, strict=True)]

    def _score(self, sample: Sample, ids: np.ndarray, raw: float) -> Score:
        value = (float(raw) - self._mean) / self._std
        if math.isfinite(value):
            return Score(_sigmoid(value) if self._squash == "sigmoid" else value)
        context = self._model.decoder.config.max_position_embeddings
        why = f"the score is {raw}"
        if len(ids) > context:
            why = f"{len(ids)} tokens do not fit into its context of {context}"
        what = f"prompt {short(sample.prompt)}, completion {short(sample.completion)}"
        return Score(None, error=f"{self._where}: {why}; {what}")

    def score_ids(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """[N] float32: the score of each of N texts, [length] int32 each, before normalising."""
        num_rows, row_len = scored_shape(max(len(ids) for ids in texts), self._mesh)
        scores = np.zeros(len(texts), np.float32)
        done = 0
        while done < len(texts):
            part = [
                {
                    "tokens": ids.astype(np.int32),
                    "mask": np.zeros(len(ids), bool),
                    "index": np.full(len(ids), done + i, np.int32),
                }
                for i, ids in enumerate(texts[done : done + num_rows * row_len])
            ]
            rows, num_used = pack(part, num_rows=num_rows, row_len=row_len)
            index, segment_ids = rows.pop("index"), rows["segment_ids"]
            batch = put_batch(rows, self._mesh)
            values = self._apply(
                self.params, batch["tokens"], batch["segment_ids"], batch["positions"]
            )
            following = np.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
            is_last = (segment_ids > 0) & (segment_ids != following)
            scores[index[is_last]] = fetch(values)[is_last]
            done += num_used
        return scores


def scored_shape(longest: int, mesh: Mesh) -> tuple[int, int]:
    """Rows, and tokens of each, that a reward model reads at once where texts have up to `longest`
    tokens."""
    row_len = _SHORTEST_ROW
    while row_len < longest:
        row_len *= 2
    return batch_shards(mesh) * max(1, _ROW_TOKENS // row_len), row_len


def check_same_ids(key: str, path: str, tokenizer: HFTokenizer) -> None:
    """Raises: UserError: if the ids of the tokenizer at `path` are not those of the policy's."""
    if difference := other_ids(path, tokenizer):
        raise UserError(
            f"{key}: {path} has another tokenizer than the policy: {difference}. It "
            "reads the ids that the policy samples: train it from a model with this tokenizer"
        )


def other_ids(path: str, tokenizer: HFTokenizer) -> str | None:
    """The first token whose id is another one in the tokenizer at `path`, in words, or None."""
    theirs, ours = load_tokenizer(path).vocab, tokenizer.vocab
    if theirs == ours:
        return None
    token = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))[0]
    there, here = theirs.get(token, "no token"), ours.get(token, "no token")
    return f"{token!r} is {there} there and {here} here"


def moments(where: str, config: RewardModelConfig) -> tuple[float, float, list[str]]:
    """Mean and standard deviation that scores are normalised by, and what to tell the user."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std, []
    file = resolve(config.path) / MOMENTS
    if not file.exists():
        warning = (
            f"{where} has no {MOMENTS}, so its scores are taken as they are (mean 0, std 1): give "
            "mean and std in the config, or make it with phase: reward"
        )
        return 0.0, 1.0, [warning]
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        mean, std = float(found["mean"]), float(found["std"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected numbers mean and std: {error!r}") from error
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise UserError(f"{file}: mean={mean}, std={std}: expected a finite mean and std > 0")
    return mean, std, []


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _named(sample: Sample) -> str:
    """The record of a sample, in a message."""
    return short(", ".join(f"{key}={value!r}" for key, value in sample.fields.items()))


def _ids(sample: Sample) -> np.ndarray:
    if sample.prompt_ids is None or sample.completion_ids is None:
        raise ValueError("a reward model scores ids: this Sample has none")
    return np.concatenate([sample.prompt_ids, sample.completion_ids])
