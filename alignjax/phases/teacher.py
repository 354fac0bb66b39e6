"""A student and a teacher on the same tokens -> how far their distributions are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from pydantic import Field, model_validator

from alignjax import losses
from alignjax.core.config import Config
from alignjax.core.errors import UserError
from alignjax.core.precision import compute_dtype
from alignjax.core.types import Params, Weighted
from alignjax.losses.vocabulary import default_chunk_size
from alignjax.models import Model, load
from alignjax.phases.common import Policy, score_hidden
from alignjax.phases.corpus import dropout_key
from alignjax.phases.scoring import other_ids
from alignjax.sharding import batch_shards
from alignjax.text import HFTokenizer
from alignjax.train.step import Batch, Metrics

TEACHER = "teacher"
"""Where the teacher's weights stand beside the student's."""
FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl, "jsd": losses.jsd,
}  # fmt: skip


class TeacherConfig(Config):
    """What is learned from."""

    path: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub. Its tokenizer must
    have the student's vocabulary; a teacher with another one teaches by text (phase: reject)."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its weights, which lie on the devices beside the student's."""


class DivergenceConfig(Config):
    """How far the student is from the teacher, token by token."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher, student): the student covers what the teacher may say. KL(student, teacher): it
    keeps to what the teacher says. jsd lies between (arXiv:2306.13649 eq. 1)."""
    beta: float | None = Field(None, gt=0, lt=1)
    """Of jsd: the teacher's share of the mixture; towards 0 it becomes forward, towards 1 reverse;
    0.5 if not given."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Divides the logits of both. The loss is not multiplied by its square."""

    @model_validator(mode="after")
    def _is_jsd(self) -> Self:
        if self.beta is not None and self.kind != "jsd":
            raise ValueError(f"beta={self.beta} is of jsd, and kind is {self.kind}: leave it out")
        return self

    @property
    def options(self) -> dict[str, float]:
        """Keyword arguments of the loss, besides the temperature."""
        return {"beta": 0.5 if self.beta is None else self.beta} if self.kind == "jsd" else {}


class Teacher(NamedTuple):
    """A model that does not train."""

    model: Model
    params: Params


def load_teacher(config: TeacherConfig, policy: Policy, mesh: Mesh, num_tokens: int) -> Teacher:
    """Reads the teacher.

    Args:
      num_tokens: what it has to read at once.
    Raises:
      UserError: if it has another vocabulary than the student, or too small a context.
    """
    check_vocabulary(config.path, policy.tokenizer)
    dtype = compute_dtype(config.compute_dtype, mesh.devices.flat[0].platform)
    model, params = load(
        config.path, mesh=mesh, compute_dtype=dtype, param_dtype=config.param_dtype
    )
    context = model.config.max_position_embeddings
    if num_tokens > context:
        raise UserError(
            f"teacher.path: {config.path} has a context of {context} tokens, and rows have "
            f"{num_tokens}: make them shorter"
        )
    return Teacher(model, params)


def check_vocabulary(path: str, tokenizer: HFTokenizer) -> None:
    """Raises: UserError: if an id is another token to the teacher at `path` than to the student."""
    if difference := other_ids(path, tokenizer):
        raise UserError(
            f"teacher.path: {path} has another vocabulary than the student: {difference}. Logits "
            "can be compared only where each id is the same token. Teach by text instead: sample "
            "the teacher (phase: reject) and fine-tune the student on that (phase: sft), which "
            "encodes it with its own tokenizer"
        )


def with_teacher(policy: Policy, teacher: Teacher) -> Params:
    """What a step is given besides the parameters that train."""
    return {**(policy.frozen or {}), TEACHER: teacher.params}


@dataclass(frozen=True)
class Pair:
    """A student and a teacher of one vocabulary: pure functions of `params`, in which the teacher's
    stand at TEACHER beside the student's.

    Attributes:
      student, teacher: one's unembedding may have more padding than the other's.
      num_shards: as in `score_tokens`.
    """

    student: Model
    teacher: Model
    num_shards: int

    @classmethod
    def of(cls, policy: Policy, teacher: Teacher, mesh: Mesh) -> Pair:
        return cls(policy.model, teacher.model, batch_shards(mesh))

    def read(self, params: Params, batch: Batch) -> Reading:
        """Both on the rows [R, T] of a batch."""
        own = {name: value for name, value in params.items() if name != TEACHER}
        rows = batch["tokens"], batch["segment_ids"], batch["positions"]
        hidden, _ = self.student.apply(own, *rows, dropout_key=dropout_key(batch))
        teacher_hidden, _ = self.teacher.apply(params[TEACHER], *rows)
        return Reading(self, own, params[TEACHER], hidden, jax.lax.stop_gradient(teacher_hidden))


class Reading(NamedTuple):
    """What student and teacher make of token rows [R, T]."""

    pair: Pair
    params: Params
    """The student's."""
    teacher_params: Params
    hidden: Array
    """[R, T, D]"""
    teacher_hidden: Array
    """[R, T, D']"""

    def divergence(self, kind: str, mask: Array, **options: Any) -> Array:
        """[R, T] float32, nats: `losses.forward_kl` or another of FUNCTIONS, 0 off mask."""
        student, teacher = self.pair.student, self.pair.teacher
        unembedding = student.unembedding(self.params)
        teacher_unembedding = teacher.unembedding(self.teacher_params)
        widths = unembedding.shape[1], teacher_unembedding.shape[1]
        return FUNCTIONS[kind](
            self.hidden,
            _widened(unembedding, max(widths)),
            self.teacher_hidden,
            _widened(teacher_unembedding, max(widths)),
            mask,
            soft_cap=student.config.logit_soft_cap,
            teacher_soft_cap=teacher.config.logit_soft_cap,
            # What only one of the two has is padding: their tokens are the same.
            vocab_size=min(widths),
            chunk_size=default_chunk_size(mask.shape[0] // self.pair.num_shards),
            **options,
        )


def _widened(unembedding: Array, width: int) -> Array:
    """[D, V] -> [D, width]"""
    missing = width - unembedding.shape[1]
    return jnp.pad(unembedding, ((0, 0), (0, missing))) if missing else unembedding


def divergence_loss(
    pair: Pair, config: DivergenceConfig, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """The divergence per target token, in nats, over token rows [R, T]."""
    mask = batch["mask"]
    found = pair.read(params, batch).divergence(
        config.kind, mask, temperature=config.temperature, **config.options
    )
    return losses.token_mean(found, mask), {}


def compared(
    pair: Pair, config: DivergenceConfig, params: Params, batch: Batch
) -> tuple[Weighted, Metrics]:
    """As `divergence_loss`, with what is measured of held-out rows: both KL divergences at
    temperature 1, whatever the loss, and what the student thinks of the tokens that are there."""
    mask = batch["mask"]
    reading = pair.read(params, batch)
    loss = reading.divergence(config.kind, mask, temperature=config.temperature, **config.options)
    kls = {kind: reading.divergence(kind, mask) for kind in ("forward_kl", "reverse_kl")}
    out = score_hidden(
        pair.student, reading.params, reading.hidden, batch, num_shards=pair.num_shards
    )
    return losses.token_mean(loss, mask), {
        **{kind: losses.token_mean(kl, mask) for kind, kl in kls.items()},
        **token_metrics(out, mask),
    }


def token_metrics(out: losses.TokenLogps, mask: Array) -> Metrics:
    """What a model thinks of the tokens that are there."""
    return {
        "nll_loss": losses.token_mean(-out.logps, mask),
        "mean_token_accuracy": losses.token_mean(out.is_argmax.astype(jnp.float32), mask),
    }
