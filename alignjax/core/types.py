"""The nouns of the library: sums with their weights, prompts, completions, sampling settings.

Nothing here imports jax at run time, so that text, data and rewards can use it without a device.
Shape letters everywhere: B batch, T time, V vocabulary, D hidden size, G samples of one prompt,
R rows of one micro-batch, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from jax import Array

Params = Mapping[str, Any]
"""A nested dict of arrays: the weights of one model."""


class Weighted(NamedTuple):
    """A sum and the weight to divide it by, kept apart until the global batch is complete.

    Adding two of them is exact however a batch is split over micro-batches and devices; a mean of
    means is not. Only `train.step` divides.
    """

    total: Array
    """[] float32; sum of the terms. Carries gradient."""
    weight: Array
    """[] float32; number of tokens, sequences or pairs. Carries no gradient."""


class Maximum(NamedTuple):
    """A running maximum, merged over micro-batches with `max`."""

    value: Array


class Minimum(NamedTuple):
    """A running minimum, merged over micro-batches with `min`."""

    value: Array


STOP, LENGTH, ABORTED = 0, 1, 2
"""Finish reasons: a stop token or sequence was sampled (and kept); the limit on tokens was reached;
the caller ended it."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. A change of numbers recompiles nothing but for `num_samples` and `max_tokens`.

    In this order: what is seen is penalised, what is banned left out, then temperature, top-k,
    top-p and min-p.

    Attributes:
      temperature: dimensionless, >= 0; divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability, in (0, 1].
      min_p: keep the tokens that are at least this fraction as likely as the most likely one, in
        [0, 1]; 0 keeps all.
      max_tokens: largest number of tokens to sample, the stop token included.
      stop_tokens: ids that end a completion; the one sampled is kept and counted.
      stop_sequences: of ids, that end a completion as their last one is sampled; kept as well.
      repetition_penalty: > 0; logits of the tokens of the prompt and of the completion so far are
        divided by it where they are above 0 and multiplied where they are below
        (arXiv:1909.05858 sec. 4.1, as implementations have it); 1 changes nothing.
      banned_tokens: ids that are never sampled.
      forced_tokens: ids that a completion starts with. They count among its tokens, and their
        log-probs are those of the model at this temperature: of all tokens, without penalty.
      num_samples: completions for each prompt (G).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 128
    stop_tokens: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    repetition_penalty: float = 1.0
    banned_tokens: tuple[int, ...] = ()
    forced_tokens: tuple[int, ...] = ()
    num_samples: int = 1


class Completions(NamedTuple):
    """What was sampled, on the host. Row i * G + g is sample g of prompt i."""

    tokens: np.ndarray
    """[B * G, C] int32, right-padded; the sampled stop token is the last real one."""
    lengths: np.ndarray
    """[B * G] int32; number of real tokens, stop token included. Masks are by length, not by id."""
    logps: np.ndarray
    """[B * G, C] float32, nats; log-prob of each sampled token under the distribution it was drawn
    from (all of `Sampling` applied; at temperature 0, that of temperature 1). 0 off
    length."""
    finish_reasons: np.ndarray
    """[B * G] int8; STOP, LENGTH or, where the caller has ended it, ABORTED."""


class GenerateFn(Protocol):
    """Token ids and lengths in, token ids, lengths, log-probs and finish reasons out."""

    def __call__(
        self,
        params: Params,
        prompts: np.ndarray,
        lengths: np.ndarray,
        key: Array,
        sampling: Sampling,
    ) -> Completions:
        """Samples G completions of each prompt.

        Args:
          params: weights of the model the function was made for.
          prompts: [B, P] int32, right-padded with anything.
          lengths: [B] int32; number of real tokens of each prompt, at least 1.
          key: PRNG key; the same key gives the same samples.
          sampling: how to sample.
        """
        ...


@dataclass(frozen=True)
class Sample:
    """One completion as text, with what a reward function may look at."""

    prompt: str
    completion: str
    reference: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    """Length of the completion in tokens, stop token included."""
    is_truncated: bool = False
    """True if the limit on tokens, not a stop token, ended it."""
    prompt_ids: np.ndarray | None = field(default=None, repr=False, compare=False)
    """[P] int32; what a reward model reads, never the text encoded anew."""
    completion_ids: np.ndarray | None = field(default=None, repr=False, compare=False)
    """[C] int32; as sampled, stop token included."""


@dataclass(frozen=True)
class Score:
    """The reward of one sample, or why there is none."""

    value: float | None
    """None if the reward function failed: the sample is left out, never trained on as a zero."""
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


class ScoreFn(Protocol):
    """Samples in, one score for each out, in order; never raises because of a sample."""

    def __call__(self, samples: Sequence[Sample]) -> list[Score]: ...


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> token ids. `encode` adds no special token of its own, ever."""

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int

    def encode(self, text: str, after: Sequence[int] = ()) -> list[int]:
        """Ids of the text, which goes on from the ids `after`, if any; special tokens spelled out
        in the text become their ids."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...

    def save(self, path: str) -> None:
        """Writes the files that `text.load_tokenizer` reads into the directory `path`."""
        ...
