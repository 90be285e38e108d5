"""Rules alone: degenerate gradients, and many of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxtransfer.multitask import mgda, pcgrad


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_the_shortest_mixture_is_the_best_of_all(tasks):
    """The optimum's own conditions, in double precision: every gradient of weight is as long along it, none shorter."""
    rng, run = np.random.default_rng(tasks), jax.jit(lambda gram: mgda(gram, None, None, {})[0])
    for case in range(12):
        rows = rng.normal(size=(tasks, 9))
        rows = rows + 2 * rng.normal(size=9) * (case % 3 == 1)  # they agree: a single one is the nearest
        rows = rows * np.exp(2 * rng.normal(size=(tasks, 1)) * (case % 3 == 2))  # of very different lengths
        weights = np.float64(run(jnp.float32(rows @ rows.T)))
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        assert weights.min() >= 0
        mixture = weights @ rows
        along = rows @ mixture
        scale = np.linalg.norm(rows, axis=1).max() * np.linalg.norm(mixture)
        assert along.min() >= mixture @ mixture - 1e-5 * scale
        assert np.all(np.abs(along - mixture @ mixture)[weights > 1e-4] <= 1e-5 * scale)


def test_gradients_of_tasks_that_are_nearly_done():
    """Lengths from 1e-4 to 1e4: weights are numbers, their mixture the shortest, by non-negative least squares."""
    rng, run = np.random.default_rng(0), jax.jit(lambda gram: mgda(gram, None, None, {})[0])
    for case in range(150):
        rows = rng.normal(size=(5, (4, 30)[case % 2])) * 10.0 ** rng.uniform(-4, 4, size=(5, 1))
        weights = np.float64(run(jnp.float32(rows @ rows.T)))
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        system = np.concatenate([rows.T / np.abs(rows).max(), np.full((1, 5), 1e4)])
        best = scipy.optimize.nnls(system, np.append(np.zeros(rows.shape[1]), 1e4))[0]
        shortest = np.linalg.norm(rows, axis=1).min()
        assert np.linalg.norm(weights @ rows) <= 1.03 * np.linalg.norm(best / best.sum() @ rows) + 3e-3 * shortest


@pytest.mark.slow
def test_degenerate_gradients():
    run = jax.jit(lambda gram: mgda(gram, None, None, {})[0])
    projected = jax.jit(lambda gram: pcgrad(gram, None, jax.random.key(0), {})[0])
    one = np.array([[3.0, 4.0]])
    for rows, want in (
        (np.zeros((3, 2)), np.zeros(2)),
        (np.concatenate([one, -one, 0 * one]), np.zeros(2)),
        (np.concatenate([one, one, one]), one[0]),
        (np.concatenate([one, 2 * one]), one[0]),
        (np.concatenate([one, -2 * one]), np.zeros(2)),
        (one, one[0]),
    ):
        gram = jnp.float32(rows @ rows.T)
        np.testing.assert_allclose(np.asarray(run(gram)) @ rows, want, atol=1e-5)
        assert np.all(np.isfinite(projected(gram)))
    weights, _ = pcgrad(jnp.float32([[1, -1], [-1, 1]]), None, None, {})  # of g and -g
    assert weights[0] == weights[1]
    np.testing.assert_array_equal(pcgrad(jnp.eye(3), None, None, {})[0], [1, 1, 1])


def test_without_a_key_tasks_meet_in_their_own_order():
    rows = np.random.default_rng(4).normal(size=(4, 2))
    total = 0
    for task in range(4):
        own = rows[task]
        for other in range(4):
            if other != task and own @ rows[other] < 0:
                own = own - own @ rows[other] / (rows[other] @ rows[other]) * rows[other]
        total = total + own
    weights, _ = pcgrad(jnp.float32(rows @ rows.T), None, None, {})
    np.testing.assert_allclose(weights @ rows, total, rtol=1e-4, atol=1e-5)
