"""Virtual adversarial training against its formula with the whole Hessian, and the finite differences as released."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt

vat = jt.losses.vat
B, D, C = 5, 6, 4


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def network(w, x):
    return np.tanh(x.reshape(len(x), -1) @ w[0]) @ w[1]


def divergence(p, q):
    return (p * np.log(p / q)).sum(-1)


def unit(x):
    return x / np.sqrt((x.reshape(len(x), -1) ** 2).sum(1)).reshape(-1, *[1] * (x.ndim - 1))


def numeric_slope(f, x, h=1e-5):
    """The gradient of Σ f(x), by central differences."""
    out = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = h
        out[place] = (np.sum(f(x + step)) - np.sum(f(x - step))) / (2 * h)
    return out


def reference(w, x, noise, radius, iterations, xi=None):
    """The values, and the points moved to."""
    p, d = softmax(network(w, x)), unit(noise)
    for _ in range(iterations):
        if xi is not None:
            d = unit(numeric_slope(lambda r: divergence(p, softmax(network(w, x + r))), xi * d))
            continue
        flat = x.reshape(B, -1)
        hidden = np.tanh(flat @ w[0])
        new = np.zeros_like(flat)
        for row in range(B):  # the Hessian of each example, whole
            jacobian = (w[0] * (1 - hidden[row] ** 2)) @ w[1]
            fisher = np.diag(p[row]) - np.outer(p[row], p[row])
            new[row] = jacobian @ fisher @ jacobian.T @ d.reshape(B, -1)[row]
        d = unit(new.reshape(x.shape))
    moved = x + radius * d
    return divergence(p, softmax(network(w, moved))), moved


@pytest.fixture
def given(rng):
    w = (rng.normal(size=(D, 7)), rng.normal(size=(7, C)))
    return w, rng.normal(size=(B, 2, 3)), rng.normal(size=(B, 2, 3))


@jax.jit
def run(w, x):
    return jnp.tanh(x.reshape(len(x), -1) @ w[0]) @ w[1]


def compiled(w, x, noise, weights, **options):
    """Values and the gradient in the weights of the network, in double precision."""

    def total(w):
        values = vat(x, noise, forward=partial(run, w), **options)
        return jnp.sum(weights * values), values

    with jax.enable_x64(True):
        w, x, noise, weights = jax.tree.map(jnp.asarray, (w, x, noise, weights))
        (_, values), slopes = jax.jit(jax.value_and_grad(total, has_aux=True))(w)
        return np.asarray(values), [np.asarray(one) for one in slopes]


@pytest.mark.parametrize(
    "options",
    [{"radius": 0.7, "iterations": 1}, {"radius": 2.0, "iterations": 3}, {"radius": 0.7, "iterations": 1, "xi": 0.4}],
)
def test_values_and_gradients_are_those_of_the_formula(given, rng, options):
    w, x, noise = given
    weights = rng.normal(size=B)
    values, slopes = compiled(w, x, noise, weights, **options)
    expected, moved = reference(w, x, noise, **options)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    p = softmax(network(w, x))  # held, as is where the inputs were moved
    for number in range(2):

        def at(one, number=number):
            both = (one, w[1]) if number == 0 else (w[0], one)
            return weights @ divergence(p, softmax(network(both, moved)))

        np.testing.assert_allclose(slopes[number], numeric_slope(at, w[number]), rtol=1e-5, atol=1e-7)


def test_it_is_the_limit_of_the_released_finite_differences(given):
    w, x, noise = given
    exact, _ = compiled(w, x, noise, np.ones(B), radius=1.0)
    released, _ = compiled(w, x, noise, np.ones(B), radius=1.0, xi=1e-6)
    np.testing.assert_allclose(exact, released, rtol=1e-5)


def test_masked_rows_change_nothing_and_get_nothing(given, rng):
    w, x, noise = given
    keep, weights = np.arange(B) != 2, rng.normal(size=B)
    values, slopes = compiled(w, x, noise, weights, radius=0.7, mask=np.float32(keep))
    few, few_slopes = compiled(w, x[keep], noise[keep], weights[keep], radius=0.7)
    np.testing.assert_allclose(values[keep], few, rtol=1e-10)
    assert values[2] == 0
    for one, other in zip(slopes, few_slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)


def test_degenerate_predictions_are_finite(given):
    w, x, noise = jax.tree.map(jnp.float32, given)
    flat, sure = (w[0], w[1] * 0), (w[0], w[1] * 1e5)

    @jax.jit
    def both(w, x, noise):
        return jax.value_and_grad(lambda w: jnp.sum(vat(x, noise, forward=partial(run, w), radius=0.5)))(w)

    value, slopes = both(flat, x, noise)
    assert value == 0
    assert not any(np.any(one) for one in jax.tree.leaves(slopes))
    for case in ((sure, x, noise), (w, x, noise * 0), (w, x * 0, noise * 1e-30), (w, x * 1e20, noise)):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(both(*case)))
    half = jax.eval_shape(lambda x: vat(x, x, forward=lambda x: x, radius=1.0), jnp.zeros((3, 4), jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_what_fits_not_is_refused():
    x = jnp.ones((3, 4))
    same = {"forward": lambda x: x}
    with pytest.raises(jt.InputError, match=r"one shape; got \(3, 4\) and \(3, 3\)"):
        vat(x, x[:, :3], **same)
    with pytest.raises(jt.InputError, match="must be floating; got int32"):
        vat(jnp.ones((3, 4), jnp.int32), jnp.ones((3, 4), jnp.int32), **same)
    for options, match in (({"radius": -1}, "radius"), ({"iterations": 0}, "an iteration"), ({"xi": 0}, "xi")):
        with pytest.raises(jt.InputError, match=match):
            vat(x, x, **same, **options)
    with pytest.raises(jt.InputError, match=r"logits \[batch, classes\] of 3 rows; got \(3,\)"):
        vat(x, x, forward=lambda x: x[:, 0])
