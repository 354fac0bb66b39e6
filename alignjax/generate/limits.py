"""`Sampling` -> arrays that the compiled functions take, and the sentences that refuse it."""

import math

import numpy as np

from alignjax.core.types import Sampling
from alignjax.generate.decode import ANY_TOKEN, NEVER, NO_TOKEN, Limits
from alignjax.generate.schedule import bucket
from alignjax.generate.truncate import Truncation
from alignjax.models import ModelConfig


def make_limits(sampling: Sampling, vocab_size: int) -> Limits:
    """Settings -> arrays. Their shapes are rungs: of how many stops there are and how long the
    longest is, of how many tokens are forced; what is off is None."""
    stops = [(token,) for token in sampling.stop_tokens]
    stops += [tuple(ids) for ids in sampling.stop_sequences]
    longest = max(map(len, stops), default=1)
    shape = bucket(len(stops), smallest=16), 1 if longest == 1 else bucket(longest)
    table = np.full(shape, NEVER, np.int32)
    for row, ids in zip(table, stops, strict=False):
        row[: -len(ids)] = ANY_TOKEN
        row[-len(ids) :] = ids
    is_banned = forced = None
    if sampling.banned_tokens:
        is_banned = np.zeros(vocab_size, bool)
        is_banned[list(sampling.banned_tokens)] = True
    if sampling.forced_tokens:
        forced = np.full(bucket(len(sampling.forced_tokens)), NO_TOKEN, np.int32)
        forced[: len(sampling.forced_tokens)] = sampling.forced_tokens
    penalty = sampling.repetition_penalty
    return Limits(
        temperature=np.float32(sampling.temperature),
        truncation=Truncation(
            np.int32(min(sampling.top_k, vocab_size)), np.float32(sampling.top_p),
            np.float32(sampling.min_p),
        ),
        stops=table,
        penalty=None if penalty == 1 else np.float32(penalty),
        is_banned=is_banned,
        forced=forced,
    )  # fmt: skip


def check(
    prompts: np.ndarray, lengths: np.ndarray, sampling: Sampling, config: ModelConfig
) -> None:
    """Raises ValueError on what makes no sense, or is more than the model has room for."""
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or not len(prompts):
        raise ValueError(
            f"prompts {prompts.shape}, lengths {lengths.shape}: expected [B, P] and [B] with B >= 1"
        )
    if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
        raise ValueError(
            f"lengths from {lengths.min()} to {lengths.max()}: expected 1 to {prompts.shape[1]}, "
            "the width of prompts; an empty prompt needs at least a bos token"
        )
    is_real = np.arange(prompts.shape[1]) < lengths[:, None]
    is_wrong = is_real & ((prompts < 0) | (prompts >= config.vocab_size))
    if is_wrong.any():
        row, column = np.argwhere(is_wrong)[0]
        raise ValueError(
            f"prompts: id {prompts[row, column]} in row {row}, column {column}; the model has ids "
            f"0 to {config.vocab_size - 1}"
        )
    _check_settings(sampling, config.vocab_size)
    context = config.max_position_embeddings
    if lengths.max() + sampling.max_tokens > context:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and max_tokens={sampling.max_tokens} exceed the "
            f"model's context of {context}; shorten the prompt or lower max_tokens"
        )


def _check_settings(sampling: Sampling, vocab_size: int) -> None:
    is_number = 0 <= sampling.temperature < math.inf  # nan is none
    is_number &= 0 < sampling.repetition_penalty < math.inf
    is_share = 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
    if not is_number or sampling.top_k < 0 or not is_share:
        raise ValueError(
            f"{sampling}: expected a finite temperature >= 0, top_k >= 0, 0 < top_p <= 1, "
            "0 <= min_p <= 1 and a finite repetition_penalty > 0"
        )
    if sampling.max_tokens < 1 or sampling.num_samples < 1:
        raise ValueError(f"{sampling}: expected max_tokens and num_samples of at least 1")
    if not all(sampling.stop_sequences):
        raise ValueError("stop_sequences: one is empty, which would end every completion at once")
    for name in ("banned_tokens", "forced_tokens"):
        wrong = [token for token in getattr(sampling, name) if not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"{name}: id {wrong[0]}; the model has ids 0 to {vocab_size - 1}")
    if len(set(sampling.banned_tokens)) == vocab_size:
        raise ValueError("banned_tokens: all there are; leave at least one")
    if len(sampling.forced_tokens) > sampling.max_tokens:
        raise ValueError(
            f"{len(sampling.forced_tokens)} forced tokens are more than max_tokens="
            f"{sampling.max_tokens}"
        )
