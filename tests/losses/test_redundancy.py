"""Barlow Twins and VICReg against loops in NumPy; masks against batches without the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree_masked, finite, single

import jaxtransfer as jt

barlow_twins, vicreg = jt.losses.barlow_twins, jt.losses.vicreg


def barlow_loop(z1, z2, strength=5e-3, eps=1e-5):
    one, two = ((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + eps) for z in (z1, z2))
    total = 0.0
    for d, e in np.ndindex(z1.shape[1], z1.shape[1]):
        c = np.mean(one[:, d] * two[:, e])
        total += (c - 1) ** 2 if d == e else strength * c**2
    return np.array(total)


def vicreg_loop(z1, z2, invariance=25.0, variance=25.0, covariance=1.0, eps=1e-4):
    total = invariance * np.mean((z1 - z2) ** 2)
    for z in (z1, z2):
        cov = np.cov(z.T, ddof=1)
        total += variance * np.mean(np.maximum(0, 1 - np.sqrt(np.diagonal(cov) + eps))) / 2
        total += covariance * (np.sum(cov**2) - np.sum(np.diagonal(cov) ** 2)) / z.shape[1]
    return np.array(total)


@pytest.fixture
def views(rng):
    spread = np.array([0.3, 2.0, 0.8])  # dimensions on both sides of the hinge
    return spread * rng.normal(size=(7, 3)), spread * rng.normal(size=(7, 3)) + 0.4


def test_barlow_twins(rng, views):
    agree_masked(barlow_twins, barlow_loop, views, rng, strength=0.3, eps=1e-3)


def test_vicreg(rng, views):
    agree_masked(vicreg, vicreg_loop, views, rng, invariance=3.0, variance=2.0, covariance=0.7, eps=1e-2)


def test_defaults_in_single_precision(views):
    def losses(a, b):
        return jnp.stack([barlow_twins(a, b), vicreg(a, b)])

    single(losses, lambda a, b: np.stack([barlow_loop(a, b), vicreg_loop(a, b)]), views)


@pytest.mark.slow
def test_degenerate_views(rng, views):
    x, y = views
    zero, flat, keep = np.zeros_like(x), np.full_like(x, 0.1), np.ones(7)
    one = np.eye(7)[2]
    cases = [(x, x, keep), (zero, y, keep), (zero, zero, keep), (flat, -flat, keep), (1e4 * x, y, keep), (x, y, one)]
    found = finite(lambda a, b, mask: (barlow_twins(a, b, mask=mask), vicreg(a, b, mask=mask)), cases)
    np.testing.assert_allclose(found[2], [3, 25 * (1 - 1e-2)], rtol=1e-6)  # uncorrelated, and no spread at all
    run = jax.jit(jax.value_and_grad(lambda a: barlow_twins(a, a) + vicreg(a, a)), compiler_options=QUICK)
    values, slopes = run(jnp.float32(x[:1]))
    np.testing.assert_allclose(values, 3 + 25 * (1 - 1e-2), rtol=1e-6)
    np.testing.assert_array_equal(slopes, 0)


def test_wrong_shapes_are_refused():
    x = jnp.zeros((4, 3))
    for loss in (barlow_twins, vicreg):
        with pytest.raises(jt.InputError, match=r"embeddings \[batch, dim\] of one shape; got \(4, 3\) and \(4, 2\)"):
            loss(x, x[:, :2])
        with pytest.raises(jt.InputError, match=r"mask must have one entry per example, \(4,\)"):
            loss(x, x, mask=jnp.ones(3))
