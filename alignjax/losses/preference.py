"""Log-probs of preferred and other completions -> losses of the DPO family, one for each pair."""

from typing import NamedTuple

from jax import Array


class Pairs(NamedTuple):
    """What policy and reference thought of both completions of N pairs; see `sequence_logps`."""

    chosen: Array
    """[N] float32, nats; sum of the policy's log-probs over the chosen completion. Carries
    gradient."""
    rejected: Array
    """[N] float32, nats; the same of the rejected completion. Carries gradient."""
    ref_chosen: Array
    """[N] float32, nats; the same under the reference. Gradient stopped. Not read by losses that
    need no reference."""
    ref_rejected: Array
    """[N] float32, nats."""
    chosen_len: Array
    """[N] int32, tokens; length of the chosen completion."""
    rejected_len: Array
    """[N] int32, tokens."""
    is_valid: Array
    """[N] bool; False where there is no pair. There, everything else may be anything."""
