"""Gradients of the losses that align domains, compiled: no comparison for equality, and right in single precision."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt
from tests.gradients import assert_right
from tests.test_no_equality import of_gradient

L = jt.losses


def directions(x):
    return jnp.asarray(np.random.default_rng(3).normal(size=(4, 6)), x.dtype)


LOSSES = {
    "mmd": lambda s, t: L.mmd(s, t, chunk=8),
    "mmd in linear time": lambda s, t: L.mmd(s[:10], t, linear=True),
    "jmmd": lambda s, t: L.jmmd((s[:, :2], s), (t[:, :2], t), sigmas=(None, 0.92)),
    "coral": lambda s, t: L.coral(s, t, released=True),
    "moment_distance": lambda s, t: L.moment_distance([s, 2 * s], t, moments=3),
    "sliced_wasserstein": lambda s, t: L.sliced_wasserstein(s, t, directions=directions(s)),
    "afn": lambda s, t: jnp.mean(L.afn(s)) + jnp.mean(L.afn(t, delta=0.3)),
}


def of_parameters(name, rng):
    """A loss of features that a matrix makes of two sets of rows, as a function of it."""
    s, t = rng.normal(size=(16, 5)), rng.normal(size=(10, 5)) + 0.5
    kernel = np.float32(rng.normal(size=(5, 4)))

    def loss(params):
        return LOSSES[name](*(jnp.tanh(jnp.asarray(x, params.dtype) @ params) for x in (s, t)))

    return loss, kernel


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_hangs_on_equality(name, rng):
    assert not of_gradient(*of_parameters(name, rng))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_gradients(name, rng):
    assert_right(*of_parameters(name, rng), differences=False, unfused=True)
