"""Distances of sorted projections against SciPy and sorting in NumPy; masks, degenerate sets, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from loss_checks import QUICK, agree_on_domains
from scipy.optimize import linprog

import jaxtransfer as jt

sliced_wasserstein = jt.losses.sliced_wasserstein


def transport(x, y):
    """The least cost of moving n equal parts to m equal parts, at squared distances: a linear program."""
    n, m = len(x), len(y)
    cost = (x[:, None] - y[None]) ** 2
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    found = linprog(cost.ravel(), A_eq=sums, b_eq=np.repeat([1 / n, 1 / m], [n, m]))
    return found.fun


def loop(p1, p2, at, directions):
    values = []
    for theta in directions.T:
        theta = theta / np.linalg.norm(theta)
        values.append(transport(p1 @ theta, p2 @ theta))
    return np.mean(values)


@pytest.fixture
def sets(rng):
    return rng.normal(size=(7, 3)), 1.5 * rng.normal(size=(5, 3)) + 0.4


@pytest.fixture
def directions(rng):
    return rng.normal(size=(3, 4))


def test_sets_of_any_size(rng, sets, directions):
    one, other = sets
    agree_on_domains(sliced_wasserstein, loop, sets, rng, directions=directions)
    value = agree_on_domains(sliced_wasserstein, loop, (one[:5], other), rng, directions=directions)
    theta = directions / np.linalg.norm(directions, axis=0)
    np.testing.assert_allclose(value, np.mean((np.sort(one[:5] @ theta, 0) - np.sort(other @ theta, 0)) ** 2))


def test_examples_left_out(rng, sets, directions):
    masks = (("p1_mask", np.arange(7) % 3 != 1), ("p2_mask", np.arange(5) != 3))
    agree_on_domains(sliced_wasserstein, loop, sets, rng, masks=masks, directions=directions)


def test_degenerate_sets(sets, directions):
    @partial(jax.jit, compiler_options=QUICK)
    def run(one, other, keep):
        def total(one, other):
            plain = sliced_wasserstein(one, other, directions=jnp.float32(directions))
            masked = sliced_wasserstein(one, other, directions=jnp.float32(directions), p1_mask=keep, p2_mask=keep)
            return plain + masked, (plain, masked)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(one, other)

    x, y = np.float32(sets[0][:5]), np.float32(sets[1])
    for given in ((x, x), (0 * x, 0 * x), (0 * x + 0.1, 0 * x + 0.1)):
        for keep in (np.ones(5), np.eye(5)[1]):
            (_, values), slopes = run(*given, keep)
            np.testing.assert_array_equal(values, 0)
            assert not any(np.any(slope) for slope in slopes)
    (_, values), slopes = run(x, y, np.zeros(5))
    assert values[1] == 0
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    ones = jax.jit(partial(sliced_wasserstein, directions=jnp.zeros((3, 2))))(x, y)  # no direction at all
    assert ones == 0


def test_a_program_for_each_device(rng, directions):
    one, other = np.float32(rng.normal(size=(16, 3))), np.float32(rng.normal(size=(8, 3)) + 1)
    keep, scale = np.float32(np.arange(16) < 13), np.float32([1.0, 0.5, 2.0])

    def total(scale, one, other, keep, axis_name=None):
        options = {"directions": jnp.float32(directions), "axis_name": axis_name}
        masked = sliced_wasserstein(one * scale[None], other, p1_mask=keep, **options)
        return masked + sliced_wasserstein(other * scale[None], 3 * other, **options)

    expected = jax.jit(jax.value_and_grad(total), compiler_options=QUICK)(scale, one, other, keep)
    mesh, split = Mesh(np.array(jax.devices()[:4]), ("devices",)), PartitionSpec("devices")

    def run(*given):
        return jax.lax.pmean(total(*given, axis_name="devices"), "devices")

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), split, split, split), out_specs=PartitionSpec())
    found = jax.jit(jax.value_and_grad(mapped), compiler_options=QUICK)(scale, one, other, keep)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((4, 3))
    with pytest.raises(jt.InputError, match=r"directions must be \[3, K\].*got \(2, 5\)"):
        sliced_wasserstein(x, x, directions=jnp.zeros((2, 5)))
    with pytest.raises(jt.InputError, match=r"features \[examples, dim\] of one dim"):
        sliced_wasserstein(x, x[:, :2], directions=jnp.zeros((3, 5)))
