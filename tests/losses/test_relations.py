"""Losses over the relations in a batch against loops over pairs and triples; masks against batches without the rows."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree_masked, finite, single

import jaxtransfer as jt

gaussian_correlation = jt.losses.gaussian_correlation
similarity_preserving, correlation_congruence, rkd_distance, rkd_angle, pkt = (
    getattr(jt.losses, name)
    for name in ("similarity_preserving", "correlation_congruence", "rkd_distance", "rkd_angle", "pkt")
)
LOSSES = (similarity_preserving, correlation_congruence, rkd_distance, rkd_angle, pkt)


def rows(features):
    return [np.asarray(f, np.float64).ravel() for f in features]


def length(vector):
    return np.sqrt(sum(vector**2))


def unit(vector):
    return vector / max(length(vector), 1e-12)


def huber(x):
    return 0.5 * x**2 if abs(x) < 1 else abs(x) - 0.5


def similarity_loop(student, teacher):
    def matrix(features):
        return [unit(np.array([x @ y for y in rows(features)])) for x in rows(features)]

    total = sum(sum((a - b) ** 2) for a, b in zip(matrix(student), matrix(teacher), strict=True))
    return total / len(student) ** 2


def congruence_loop(student, teacher):
    gaps = [np.abs(s - t) for s, t in zip(rows(student), rows(teacher), strict=True)]
    if len(gaps) < 2:
        return np.zeros(())
    return sum(sum(a * b) for a, b in itertools.pairwise(gaps)) / (len(gaps) - 1)


def gaussian_loop(features, gamma, order):
    out = np.zeros((len(features), len(features)))
    for i, x in enumerate(rows(features)):
        for j, y in enumerate(rows(features)):
            for p in range(order + 1):
                factor = math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p)
                out[i, j] += factor * (unit(x) @ unit(y)) ** p
    return out


def kernel_loop(student, teacher, gamma=0.4, order=2):
    return np.mean((gaussian_loop(student, gamma, order) - gaussian_loop(teacher, gamma, order)) ** 2)


def distances(features):
    points = rows(features)
    out = np.zeros((len(points), len(points)))
    for i, j in np.ndindex(*out.shape):
        if i != j:
            out[i, j] = np.sqrt(max(sum((points[i] - points[j]) ** 2), 1e-12))
    return out / out[out > 0].mean()


def distance_loop(student, teacher):
    return np.mean([huber(a - b) for a, b in zip(distances(student).flat, distances(teacher).flat, strict=True)])


def angles(features):
    points = rows(features)
    for x in points:
        for y in points:
            for z in points:
                yield unit(y - x) @ unit(z - x)


def angle_loop(student, teacher):
    return np.mean([huber(a - b) for a, b in zip(angles(student), angles(teacher), strict=True)])


def neighbours(features, eps):
    points = [x / (length(x) + eps) for x in rows(features)]
    for x in points:
        row = np.array([(x @ y + 1) / 2 for y in points])
        yield from row / sum(row)


def pkt_loop(student, teacher, eps=1e-7):
    pairs = zip(neighbours(student, eps), neighbours(teacher, eps), strict=True)
    return np.mean([q * np.log((q + eps) / (p + eps)) for p, q in pairs])


@pytest.fixture
def features(rng):
    return rng.normal(size=(5, 4)), 0.5 * rng.exponential(size=(5, 2, 3))


@pytest.fixture
def equal(rng):
    return rng.normal(size=(5, 3, 2)), rng.exponential(size=(5, 3, 2))


@pytest.mark.parametrize(
    ("loss", "reference"),
    [(similarity_preserving, similarity_loop), (rkd_distance, distance_loop), (rkd_angle, angle_loop)],
    ids=["similarity", "distance", "angle"],
)
def test_relations(rng, features, loss, reference):
    agree_masked(loss, reference, features, rng)


@pytest.mark.parametrize("eps", [1e-7, 0.1])
def test_pkt(rng, features, eps):
    agree_masked(pkt, pkt_loop, features, rng, eps=eps)


def test_correlation_congruence(rng, equal):
    agree_masked(correlation_congruence, congruence_loop, equal, rng)
    agree_masked(correlation_congruence, congruence_loop, [x[:1] for x in equal], rng)


def by_kernel(student, teacher, *, gamma, mask=None):
    def kernel(features):
        return gaussian_correlation(features, gamma=gamma, order=3)

    return correlation_congruence(student, teacher, kernel=kernel, mask=mask)


@pytest.mark.parametrize("gamma", [0.4, 1.5])
def test_correlation_congruence_of_a_kernel(rng, features, gamma):
    agree_masked(by_kernel, lambda s, t, gamma: kernel_loop(s, t, gamma, 3), features, rng, gamma=gamma)


def test_the_gaussian_correlation_is_the_kernel_to_its_order(rng):
    x = rng.normal(size=(4, 3))
    exact = np.array([[np.exp(-0.4 * sum((unit(a) - unit(b)) ** 2)) for b in x] for a in x])
    for order, error in ((0, 0.6), (1, 0.2), (2, 0.05), (9, 1e-6)):
        found = gaussian_correlation(jnp.float32(x), order=order)
        np.testing.assert_allclose(found, gaussian_loop(x, 0.4, order), rtol=1e-5)
        np.testing.assert_allclose(found, exact, atol=error)
    np.testing.assert_allclose(gaussian_correlation(jnp.float32(x)), gaussian_loop(x, 0.4, 2), rtol=1e-5)


@pytest.mark.slow
def test_defaults_in_single_precision(equal):
    def losses(s, t):
        found = [loss(s, t) for loss in LOSSES]
        return jnp.stack([*found, correlation_congruence(s, t, kernel=gaussian_correlation)])

    def loops(s, t):
        found = [loop(s, t) for loop in (similarity_loop, congruence_loop, distance_loop, angle_loop, pkt_loop)]
        return np.stack([*found, kernel_loop(s, t)])

    single(losses, loops, equal, rtol=1e-4)


def everything(s, t, mask=None):
    found = [loss(s, t, mask=mask) for loss in LOSSES]
    return *found, correlation_congruence(s, t, kernel=gaussian_correlation, mask=mask)


@pytest.mark.slow
def test_degenerate_features(rng):
    x, y = rng.normal(size=(2, 4, 3))
    zero, flat, one = np.zeros_like(x), np.full_like(x, 0.1), np.array([0, 1, 0, 0])
    twins = x[[0, 0, 1, 2]]
    opposite = np.array([1, -1, 1, -1])[:, None] * x[:1]
    cases = [(x, x), (twins, y), (y, twins), (zero, y), (y, zero), (zero, zero), (flat, y), (flat, flat)]
    cases += [(1e4 * x, y), (opposite, y), (opposite, opposite), (x * [[0], [1], [1], [1]], y)]
    masked = [(s, t, np.ones(4)) for s, t in cases]
    alone = [np.where(one[:, None], z, np.nan) for z in (x, y)]
    found = finite(everything, [*masked, (*alone, one)])
    for case in (0, 5, 7, 10, 12):
        np.testing.assert_allclose(found[case], 0, atol=1e-7)


def test_a_batch_of_one(rng):
    x, y = (np.float32(rng.normal(size=(1, 3))) for _ in range(2))
    run = jax.jit(jax.value_and_grad(lambda s: sum(everything(s, y))), compiler_options=QUICK)
    np.testing.assert_allclose(np.concatenate([leaf.ravel() for leaf in run(x)]), 0, atol=1e-7)


def test_second_derivatives_of_distances(rng, x64):
    x, y, direction = rng.normal(size=(3, 5, 4))
    slope = jax.grad(rkd_distance)
    run = jax.jit(lambda x, y, d: jax.jvp(lambda x: slope(x, y), (x,), (d,)), compiler_options=QUICK)
    ahead, behind = (run(x + step * direction, y, direction)[0] for step in (1e-5, -1e-5))
    np.testing.assert_allclose(run(x, y, direction)[1], (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)


def test_a_distant_origin_does_not_matter(rng):
    """Distances are those between the examples: common offsets cost no digits that the features had."""
    x, y = (np.float32(np.round(z * 64) / 64) for z in rng.normal(size=(2, 6, 5)))
    for loss in (rkd_distance, rkd_angle):
        run = jax.jit(loss)
        np.testing.assert_allclose(run(x + np.float32(1024), y), run(x, y), rtol=1e-6)


def test_wrong_shapes_are_refused():
    x = jnp.zeros((4, 3))
    for loss in LOSSES[:1] + LOSSES[2:]:
        for wrong in (x[:2], x[0, 0], x[0]):
            with pytest.raises(
                jt.InputError, match=r"features \[batch, ...\] of the same examples; got student \(4, 3\)"
            ):
                loss(x, wrong)
    with pytest.raises(jt.InputError, match=r"features \[batch, ...\] of one shape; got student \(4, 3\)"):
        correlation_congruence(x, x[:, :2])
    for loss in LOSSES:
        with pytest.raises(jt.InputError, match=r"mask must have one entry per example, \(4,\); got \(4, 1\)"):
            loss(x, x, mask=jnp.ones((4, 1)))
