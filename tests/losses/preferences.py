"""What the tests of losses of pairs share: oracles pair by pair, pairs by hand, extremes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import losses

LOG2, LOG3 = np.log(2.0), np.log(3.0)


def softplus(x):
    """log(1 + exp(x)): -log sigmoid(-x)."""
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def per_pair(term):
    """`term(pair, **options)`, for one pair a dict of numbers, in a loop over the valid pairs."""

    def terms(pairs, **rest):
        out = np.zeros(len(pairs["is_valid"]))
        for n in np.flatnonzero(pairs["is_valid"]):
            pair = {name: x[n] for name, x in pairs.items()}
            arrays = {k: x[n] if np.ndim(x) == 1 else x for k, x in rest.items()}
            out[n] = term(pair, **arrays)
        return out

    return terms


def without_slope(term, name):
    """`per_pair(term)` where the array `name` is a constant: its value before it was perturbed."""

    def oracle(frozen, **rest):
        return per_pair(term)(**{**rest, name: frozen[name]})

    return oracle


def gains(p):
    """D_w and D_l."""
    return p["chosen"] - p["ref_chosen"], p["rejected"] - p["ref_rejected"]


def means(p):
    """m_w and m_l."""
    return p["chosen"] / p["chosen_len"], p["rejected"] / p["rejected_len"]


def pairs(chosen, rejected, ref_chosen=None, ref_rejected=None, lengths=(1, 1), is_valid=None):
    """Pairs of one number or of lists; the reference thinks 0 unless told."""
    chosen, rejected = (jnp.atleast_1d(jnp.asarray(x, jnp.float32)) for x in (chosen, rejected))

    def reference(x):
        x = 0.0 if x is None else x
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32), chosen.shape)

    chosen_len, rejected_len = (jnp.full(chosen.shape, n, jnp.int32) for n in lengths)
    on = jnp.ones(chosen.shape, bool) if is_valid is None else jnp.asarray(is_valid)
    return losses.Pairs(
        chosen,
        rejected,
        reference(ref_chosen),
        reference(ref_rejected),
        chosen_len,
        rejected_len,
        on,
    )


def gradients(loss, given, *rest, **options):
    """By chosen and by rejected, [N] each: a pair's own loss only."""
    grads = jax.grad(lambda p: loss(p, *rest, **options).sum(), allow_int=True)(given)
    return np.asarray(grads.chosen), np.asarray(grads.rejected)


def assert_finite_at_extremes(loss, *rest, **options):
    """All four log-probs at 0 and at -1e4, in every combination."""
    columns = np.array(list(itertools.product([0.0, -1e4], repeat=4)), np.float32).T
    given = pairs(*columns)
    assert np.isfinite(loss(given, *rest, **options)).all()
    for grad in gradients(loss, given, *rest, **options):
        assert np.isfinite(grad).all()
