"""Eight-bit codes of moments: how exact, without bias, never 0 where they divide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.train.moments import BLOCK, Codes, decode, encode, stored

packed_of = jax.jit(encode, static_argnames="is_signed")


def magnitudes(shape, seed=0):
    """Over seven orders, as second moments are."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(-16, 0, shape)).astype(np.float32)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("size", [BLOCK, BLOCK + 5])
def test_values_come_back_as_a_neighbour(size, is_signed):
    x = magnitudes((3, size))
    if is_signed:
        x *= np.random.default_rng(1).choice([-1, 1], x.shape)
    packed = packed_of(jnp.asarray(x), jax.random.PRNGKey(0), is_signed=is_signed)
    assert packed.codes.dtype == (jnp.int8 if is_signed else jnp.uint8)
    assert packed.codes.shape == x.shape and packed.scales.shape == (3, -(-size // BLOCK))
    levels = 127 if is_signed else 255
    top = np.repeat(np.asarray(packed.scales), BLOCK, axis=1)[:, :size]
    # One step of the code below and above, by the formula.
    place = levels * (np.abs(x) / top) ** 0.25
    low = np.sign(x) * top * (np.maximum(np.floor(place - 1e-3), 0) / levels) ** 4
    high = np.sign(x) * top * (np.ceil(place + 1e-3) / levels) ** 4
    y = np.asarray(decode(packed))
    slack = 1e-6 * np.abs(high)
    assert (y >= np.minimum(low, high) - slack).all()
    assert (y <= np.maximum(low, high) + slack).all()
    largest = np.abs(x) == top
    np.testing.assert_allclose(y[largest], x[largest], rtol=1e-6)


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_mean_over_keys_is_the_value(is_signed):
    x = jnp.asarray(magnitudes((64,), seed=2))[None]
    x = jnp.concatenate([x, jnp.ones((1, 64))], axis=1) * (-1.0 if is_signed else 1.0)
    keys = jax.random.split(jax.random.PRNGKey(0), 4000)
    many = jax.vmap(lambda key: decode(encode(x, key, is_signed=is_signed)))(keys)
    error = np.asarray(jnp.mean(many, 0) - x)
    spread = np.asarray(jnp.std(many, 0)) / np.sqrt(4000)
    # But for the smallest, which without signs are never 0.
    counts = np.abs(np.asarray(x)) > (0 if is_signed else (1 / 255) ** 4)
    assert (np.abs(error) < 5 * spread + 1e-6 * np.abs(np.asarray(x)))[counts].all()
    assert np.asarray(jnp.std(many, 0)).max() > 0, "rounded at random"


def test_what_divides_is_never_0_unless_it_was():
    x = jnp.array([[1.0, 1e-12, 1e-30, 0.0]])
    y = np.asarray(decode(packed_of(x, jax.random.PRNGKey(0), is_signed=False)))
    assert (y[0, :3] > 0).all() and y[0, 3] == 0
    zeros = packed_of(jnp.zeros((2, 300)), jax.random.PRNGKey(0), is_signed=False)
    assert not np.asarray(decode(zeros)).any()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_second_moment_falls_again(kind):
    """After a large gradient come small ones. Rounded to the nearest, it would stay up: a step of
    0.1% is less than half the distance to the next value."""
    transform = stored(optax.scale_by_adam(b2=0.999), kind)
    params = {"kernel": jnp.ones((4, 64))}

    @jax.jit
    def falling(state):
        grads = {"kernel": jnp.zeros((4, 64))}
        step = lambda state, _: (transform.update(grads, state)[1], None)  # noqa: E731
        return jax.lax.scan(step, state, length=1000)[0]

    _, state = transform.update({"kernel": jnp.full((4, 64), 2.0)}, transform.init(params))

    def nu(state):
        x = state.nu["kernel"]
        return np.asarray(decode(x) if isinstance(x, Codes) else x.astype(jnp.float32))

    first, last = nu(state), nu(falling(state))
    np.testing.assert_allclose(first, 0.001 * 4.0, rtol=0.02)
    assert last.mean() == pytest.approx(first.mean() * 0.999**1000, rel=0.03)
