"""Stepwise adaptive feature norm: its value is constant, its gradient lengthens the features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree

import jaxtransfer as jt

afn = jt.losses.afn


def test_against_lengths_that_stay(rng):
    features = rng.normal(size=(5, 4))
    lengths = np.linalg.norm(features, axis=1)

    def loop(features, delta):
        return np.array(
            [(np.linalg.norm(f) - (length + delta)) ** 2 for f, length in zip(features, lengths, strict=True)]
        )

    agree(afn, loop, [features], rng, delta=0.3)


def test_maps_zero_vectors_and_types(rng):
    maps = np.float32(rng.normal(size=(3, 2, 2, 2)))
    maps[1] = 0
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(afn(x))), compiler_options=QUICK)
    value, slopes = run(maps)
    np.testing.assert_allclose(value, 3, rtol=1e-6)
    flat = maps.reshape(3, -1)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(slopes.reshape(3, -1), -2 * flat / np.where(lengths > 0, lengths, 1), rtol=1e-5)
    assert jax.eval_shape(afn, jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    with pytest.raises(jt.InputError, match=r"features must be \[examples, ...\]; got \(3,\)"):
        afn(jnp.zeros(3))
    with pytest.raises(jt.InputError, match="delta must be finite and not negative; got -1"):
        afn(jnp.zeros((3, 2)), delta=-1)
