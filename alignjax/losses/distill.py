"""Hidden states of a student and of a teacher -> divergences of their distributions, per token.

Both have one vocabulary; neither's logits exist whole (see `losses.vocabulary`). The temperature
divides the logits of both. No loss is multiplied by its square, which would keep the size of the
gradients: that factor is the caller's. Only the student's hidden states and unembedding carry
gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from alignjax.losses import vocabulary


def forward_kl(
    hidden: Array,
    unembedding: Array,
    teacher_hidden: Array,
    teacher_unembedding: Array,
    mask: Array,
    *,
    temperature: Array | float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Per-token KL(teacher || student) = sum_v p_T log(p_T / p_S): covers all the teacher may say.

    Args:
      hidden: [B, T, D] float32 or bfloat16; the student's, final-normed; hidden[t - 1] predicts
        token t. Carries gradient.
      unembedding: [D, V] float32 or bfloat16; the student's. Carries gradient.
      teacher_hidden: [B, T, D'] float32 or bfloat16; the teacher's, on the same tokens. Gradient
        stopped.
      teacher_unembedding: [D', V] float32 or bfloat16. Gradient stopped.
      mask: [B, T] bool; True on the tokens whose distributions are compared; mask[:, 0] is ignored.
        Hidden states that predict none of them may be anything, even nan.
      temperature: [] float or a number, dimensionless, > 0; divides the logits of both. Traced;
        gradient stopped.
      soft_cap, teacher_soft_cap, vocab_size, chunk_size: as in `next_token_logps`; where the two
        unembeddings are padded differently, pad the smaller and pass vocab_size. A chunk holds the
        logits of both.
    Returns:
      [B, T] float32 (float64 if hidden is), nats, exactly 0 off mask and at t = 0.
    Raises:
      AssertionError: at trace time, on a rank, shape or dtype other than the above.
      ValueError: if the vocabularies differ; else as in `next_token_logps`.
    Source: arXiv:1503.02531 sec. 2; arXiv:2306.13649 sec. 2.
    """
    return _divergence(
        _forward_kl,
        hidden,
        unembedding,
        teacher_hidden,
        teacher_unembedding,
        mask,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )


def reverse_kl(
    hidden: Array,
    unembedding: Array,
    teacher_hidden: Array,
    teacher_unembedding: Array,
    mask: Array,
    *,
    temperature: Array | float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Per-token KL(student || teacher) = sum_v p_S log(p_S / p_T): keeps to what the teacher says.

    With a policy as the student and a reference as the teacher this is the exact KL penalty of
    reinforcement learning, over the whole vocabulary; `k1`, `k2` and `k3` estimate it from one
    token.

    Arguments, result and errors as in `forward_kl`.

    Source: arXiv:2306.13649 sec. 2.
    """
    return _divergence(
        _reverse_kl,
        hidden,
        unembedding,
        teacher_hidden,
        teacher_unembedding,
        mask,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )


def jsd(
    hidden: Array,
    unembedding: Array,
    teacher_hidden: Array,
    teacher_unembedding: Array,
    mask: Array,
    *,
    beta: float = 0.5,
    temperature: Array | float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Per-token beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S.

    The generalised Jensen-Shannon divergence of teacher and student, at most log 2. Divided by beta
    it tends to `forward_kl` as beta -> 0, divided by 1 - beta to `reverse_kl` as beta -> 1.

    Arguments, result and errors as in `forward_kl`, and:

    Args:
      beta: dimensionless, the teacher's share of the mixture.
    Raises:
      ValueError: unless 0 < beta < 1: at the ends the divergence is 0.
    Source: arXiv:2306.13649 eq. 1 (GKD).
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta={beta}: expected 0 < beta < 1; for its limits, 0 and 1, use forward_kl and "
            "reverse_kl"
        )
    return _divergence(
        _jsd,
        hidden,
        unembedding,
        teacher_hidden,
        teacher_unembedding,
        mask,
        beta,
        temperature=temperature,
        soft_cap=soft_cap,
        teacher_soft_cap=teacher_soft_cap,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )


def top_k_forward_kl(
    hidden: Array,
    unembedding: Array,
    teacher_ids: Array,
    teacher_logps: Array,
    mask: Array,
    *,
    temperature: Array | float = 1.0,
    soft_cap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Per-token sum_{k <= K} p_T log(p_T / p_S) + t_T log(t_T / t_S), t the rest: 1 - sum_k p.

    The KL of teacher and student once all tokens but the teacher's K are one: at most `forward_kl`,
    and equal to it at K = V - 1. The student's rest is summed over its own tokens, so that neither
    value nor gradient suffers where it is almost 0; the teacher's is 0 where its K tokens take all.

    Arguments, result and errors as in `forward_kl`, and:

    Args:
      teacher_ids: [B, T, K] int32, 1 <= K < V (or vocab_size); different tokens, 0 <= id < V under
        the mask; elsewhere anything. Entry t is about token t, as from
        `next_token_logps(..., top_k=K)`.
      teacher_logps: [B, T, K] floating, nats, finite under the mask; the teacher's log-probs of
        them at this temperature, over the whole vocabulary. Gradient stopped.
    Raises:
      ValueError: if K is out of its range.
    Source: the KL of a coarser partition, no more than that of a finer one (T. Cover, J. Thomas,
      "Elements of Information Theory", 2006, thm. 2.7.1).
    """
    chex.assert_rank([teacher_ids, teacher_logps], 3)
    chex.assert_equal_shape([teacher_ids, teacher_logps])
    chex.assert_type([teacher_ids, teacher_logps], [jnp.int32, float])
    readout = vocabulary.readout(unembedding, soft_cap, vocab_size)
    if not 1 <= teacher_ids.shape[2] < readout.num_real(unembedding):
        raise ValueError(
            f"teacher_ids is {teacher_ids.shape}: expected 1 to "
            f"{readout.num_real(unembedding) - 1} tokens, so that there is a rest"
        )
    return vocabulary.by_token(
        _TopK(readout),
        hidden,
        unembedding,
        (teacher_ids, teacher_logps),
        vocabulary.divisor(temperature, hidden),
        mask,
        chunk_size=chunk_size,
    )


Divergence = Callable[..., Array]
"""Log-probs of teacher and student [..., V] and what else it takes -> [...]."""


def _forward_kl(log_t: Array, log_s: Array) -> Array:
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def _reverse_kl(log_t: Array, log_s: Array) -> Array:
    return _forward_kl(log_s, log_t)


def _jsd(log_t: Array, log_s: Array, beta: Array) -> Array:
    log_m = jnp.logaddexp(jnp.log(beta) + log_t, jnp.log1p(-beta) + log_s)
    return beta * _forward_kl(log_t, log_m) + (1.0 - beta) * _forward_kl(log_s, log_m)


@dataclass(frozen=True)
class _Compared:
    """Logits of the student and hidden states of the teacher -> a divergence of the two."""

    divergence: Divergence
    student: vocabulary.Readout
    teacher: vocabulary.Readout

    def __call__(self, z: Array, teacher_hidden: Array, constants: Any) -> Array:
        teacher_unembedding, tau, more = constants
        teacher_z = vocabulary.logits(teacher_hidden, teacher_unembedding)
        log_t = self.teacher.log_softmax(teacher_z, tau)
        return self.divergence(log_t, self.student.log_softmax(z, tau), *more)


def _divergence(
    divergence: Divergence,
    hidden: Array,
    unembedding: Array,
    teacher_hidden: Array,
    teacher_unembedding: Array,
    mask: Array,
    *more: float,
    temperature: Array | float,
    soft_cap: float | None,
    teacher_soft_cap: float | None,
    vocab_size: int | None,
    chunk_size: int | None,
) -> Array:
    vocabulary.check_states(
        "teacher_hidden", teacher_hidden, "teacher_unembedding", teacher_unembedding
    )
    if unembedding.shape[-1] != teacher_unembedding.shape[-1]:
        raise ValueError(
            f"the student's vocabulary has {unembedding.shape[-1]} entries, the teacher's "
            f"{teacher_unembedding.shape[-1]}: expected one vocabulary; if they differ in padding "
            "alone, pad the smaller unembedding with zeros and pass vocab_size"
        )
    tau = vocabulary.divisor(temperature, hidden)
    return vocabulary.by_token(
        _Compared(
            divergence,
            vocabulary.readout(unembedding, soft_cap, vocab_size),
            vocabulary.readout(teacher_unembedding, teacher_soft_cap, vocab_size),
        ),
        hidden,
        unembedding,
        jnp.roll(teacher_hidden, 1, axis=1),  # to the token that it predicts
        (teacher_unembedding, tau, [jnp.asarray(x, tau.dtype) for x in more]),
        mask,
        chunk_size=chunk_size,
    )


@dataclass(frozen=True)
class _TopK:
    """Logits of the student and the teacher's most likely tokens -> the KL with one bucket more."""

    student: vocabulary.Readout

    def __call__(self, z: Array, teacher: tuple[Array, Array], tau: Array) -> Array:
        ids, log_t = teacher
        log_t = log_t.astype(z.dtype)
        log_s = self.student.log_softmax(z, tau)
        rest = self.student.only_real(log_s, -jnp.inf)
        # Row by row, which keeps rows that are spread over devices where they are.
        rest = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(-jnp.inf)))(rest, ids)
        log_rest = jax.nn.logsumexp(rest, axis=-1)
        teachers_rest = jnp.maximum(-jnp.expm1(jax.nn.logsumexp(log_t, axis=-1)), 0.0)
        top = _forward_kl(log_t, jnp.take_along_axis(log_s, ids, axis=-1))
        return (
            top + jax.scipy.special.xlogy(teachers_rest, teachers_rest) - teachers_rest * log_rest
        )
