"""kd, dkd, dist against loops over single examples and classes in double precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree, agree_masked, finite, single

import jaxtransfer as jt

kd, dkd, dist, standardize_logits = (getattr(jt.losses, n) for n in ("kd", "dkd", "dist", "standardize_logits"))
LABELS = np.array([0, 3, 6, 2, 3], np.int32)
HUGE = np.array([[1e4, 0, 1], [-1e4, 1e4, 0], [1e4, 1e4, 1e4], [0, 0, 0], [1e4, -1e4, -1e4]])


def softmax(row):
    weights = [np.exp(z - max(row)) for z in row]
    return np.array([w / sum(weights) for w in weights])


def divergence(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


def z_score(row):
    mean = sum(row) / len(row)
    return (row - mean) / (1e-7 + np.sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1)))


def kd_loop(student, teacher, temperature, standardize=False):
    values = []
    for s, t in zip(student, teacher, strict=True):
        s, t = (z_score(s), z_score(t)) if standardize else (s, t)
        values.append(temperature**2 * divergence(softmax(t / temperature), softmax(s / temperature)))
    return np.array(values)


def dkd_loop(student, teacher, alpha=1.0, beta=8.0, temperature=4.0):
    values = []
    for s, t, y in zip(student, teacher, LABELS, strict=True):
        p, q = softmax(t / temperature), softmax(s / temperature)
        own = divergence([p[y], sum(np.delete(p, y))], [q[y], sum(np.delete(q, y))])
        p, q = (softmax(np.delete(z, y) / temperature) for z in (t, s))
        values.append(temperature**2 * (alpha * own + beta * divergence(p, q)))
    return np.array(values)


def pearson(a, b):
    a, b = a - sum(a) / len(a), b - sum(b) / len(b)
    return sum(a * b) / (np.sqrt(sum(a * a)) * np.sqrt(sum(b * b)) + 1e-8)


def dist_loop(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    p, q = (np.array([softmax(row / temperature) for row in rows]) for rows in (student, teacher))
    rows = [pearson(a, b) for a, b in zip(p, q, strict=True)]
    columns = [pearson(a, b) for a, b in zip(p.T, q.T, strict=True)]
    return temperature**2 * (beta * (1 - sum(rows) / len(rows)) + gamma * (1 - sum(columns) / len(columns)))


@pytest.fixture
def logits(rng):
    return rng.normal(scale=2, size=(5, 7)), 0.5 + rng.exponential(scale=2, size=(5, 7))


def kd_of_scores(student, teacher, temperature):
    return kd(student, teacher, temperature=temperature, standardize=True)


def dkd_labelled(student, teacher, **options):
    return dkd(student, teacher, jnp.asarray(LABELS), **options)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_kd(rng, logits, temperature):
    agree(kd, kd_loop, logits, rng, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_kd_of_standardized_logits(rng, logits, temperature):
    agree(kd_of_scores, partial(kd_loop, standardize=True), logits, rng, temperature=temperature)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 2.0, 1.0), (3.0, 0.0, 0.5)])
def test_dkd(rng, logits, alpha, beta, temperature):
    agree(dkd_labelled, dkd_loop, logits, rng, alpha=alpha, beta=beta, temperature=temperature)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 0.3, 0.5)])
def test_dist(rng, logits, beta, gamma, temperature):
    agree_masked(dist, dist_loop, logits, rng, beta=beta, gamma=gamma, temperature=temperature)


@pytest.mark.slow
def test_defaults_in_single_precision(logits):
    """What is not given is what the released code has."""
    single(lambda s, t: (kd(s, t, temperature=3.0) + dkd_labelled(s, t)) * dist(s, t),
           lambda s, t: (kd_loop(s, t, 3.0) + dkd_loop(s, t)) * dist_loop(s, t), logits)  # fmt: skip
    rows = logits[0].astype(np.float32)
    np.testing.assert_allclose(standardize_logits(rows), [z_score(row) for row in logits[0]], rtol=1e-5, atol=1e-6)


def test_kd_of_any_size_and_distance(logits):
    """One compiled function: the digits stay at any temperature, offset, scale and closeness of the two."""
    s, t = (np.float32(z) for z in logits)

    @jax.jit
    def run(s, t, temperature):
        values = kd(s, t, temperature=temperature)
        return values, jax.grad(lambda s: kd(s, t, temperature=temperature).sum())(s)

    for temperature in (1.0, 30.0, 1e3, 1e4):
        for student in (s, s + np.float32(1e4), 30 * s, t + np.float32(1e-3) * s):
            values, slopes = run(student, t, temperature)
            student = np.float64(student)
            if temperature < 1e3:
                np.testing.assert_allclose(values, kd_loop(student, np.float64(t), temperature), rtol=1e-5)
                continue
            rest = student - student.mean(1, keepdims=True) - t + t.mean(1, keepdims=True, dtype=np.float64)
            near = 10 * (np.abs(rest).max() + np.abs(t).max()) / temperature  # the limit is reached like 1/T
            np.testing.assert_allclose(values, (rest**2).mean(1) / 2, rtol=near)
            np.testing.assert_allclose(slopes, rest / 7, rtol=1e-3, atol=near * np.abs(rest).max() / 7)


@pytest.mark.slow
def test_gradients_at_a_huge_temperature_keep_their_digits(logits):
    def loss(s, t):
        return dkd(s, t, jnp.asarray(LABELS), temperature=3e3).sum()

    slopes = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)
    single = slopes(*(jnp.float32(z) for z in logits))
    with jax.enable_x64(True):
        double = slopes(*(jnp.asarray(np.float64(np.float32(z))) for z in logits))
    for ours, theirs in zip(single, double, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_second_derivatives(logits):
    """The Hessian of T² KL in the student's logits is diag q − q qᵀ, near the teacher and far from it."""
    hessian = jax.jit(jax.hessian(lambda s, t: kd(s, t, temperature=2.0).sum()), compiler_options=QUICK)
    s, t = (np.float32(z[:1]) for z in logits)
    for student in (s, 30 * s, t):
        q = softmax(np.ravel(student) / 2)
        np.testing.assert_allclose(hessian(student, t)[0, :, 0], np.diag(q) - np.outer(q, q), atol=1e-6)


def test_degenerate_logits(rng):
    other = rng.normal(size=HUGE.shape)
    cases = [(HUGE, other), (other, HUGE), (HUGE, HUGE[::-1]), (HUGE, HUGE), (other, other), (0 * other, other)]
    cases += [(other, 0 * other), (1e-30 * other, other), (np.full_like(other, 0.1), np.full_like(other, -0.3))]
    labels = jnp.array([0, 1, 2, 0, 1])
    scores = partial(kd, temperature=4.0, standardize=True)
    found = finite(lambda s, t: (dkd(s, t, labels), scores(s, t), dist(s, t)), cases)
    for number in (3, 4, 8):
        np.testing.assert_array_equal(np.concatenate(found[number][:2]), 0)


def test_kd_of_huge_logits(rng):
    other = rng.normal(size=HUGE.shape).astype(np.float32)
    loss = jax.jit(jax.value_and_grad(lambda s, t: kd(s, t, temperature=1.0).sum()), compiler_options=QUICK)
    for s, t in ((HUGE, other), (other, HUGE), (HUGE, HUGE[::-1])):
        s, t = np.asarray(s, np.float64), np.asarray(t, np.float64)
        p, q = (np.array([softmax(row) for row in rows]) for rows in (t, s))
        logs = [row - max(row) - np.log(sum(np.exp(row - max(row)))) for row in s]  # finite where q underflows
        expected = sum(a * (np.log(a) - b) for a, b in zip(p.flat, np.ravel(logs), strict=True) if a)
        value, slopes = loss(np.float32(s), np.float32(t))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(slopes, q - p, atol=1e-6)


@pytest.mark.slow
def test_one_example_of_few_classes(rng):
    def total(s, t):
        values = dkd(s, t, jnp.array([0])), kd(s, t, temperature=2.0, standardize=True)
        return values[0][0] + values[1][0] + dist(s, t), values

    run = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)
    s, t = rng.normal(size=(2, 1, 2)).astype(np.float32)
    (_, values), slopes = run(s, t)
    np.testing.assert_allclose(values[0], kd_loop(s, t, 4.0), rtol=1e-5)  # the others are one class, which is certain
    assert np.all(np.isfinite(slopes))
    (_, values), slopes = run(s[:, :1], t[:, :1])
    np.testing.assert_array_equal(np.concatenate([*values, slopes[0]]), 0)


def test_classes_that_are_ruled_out(logits):
    s, t = (np.float32(z) for z in logits)
    ruled = np.arange(7)[None] == 2
    loss = jax.jit(jax.value_and_grad(lambda s, t: kd(s, t, temperature=2.0).sum()), compiler_options=QUICK)
    value, slopes = loss(*(jnp.where(ruled, -jnp.inf, z) for z in (s, t)))
    np.testing.assert_allclose(value, kd_loop(np.delete(s, 2, 1), np.delete(t, 2, 1), 2.0).sum(), rtol=1e-5)
    assert np.all(np.isfinite(slopes))
    assert np.isfinite(loss(s, jnp.where(ruled, -jnp.inf, t))[0])
    assert np.isposinf(loss(jnp.where(ruled, -jnp.inf, s), t)[0])


def test_a_label_out_of_range_is_nan_and_only_its_own_row(logits):
    s, t = (jnp.asarray(z, jnp.float32) for z in logits)
    loss = jax.jit(lambda s, labels: dkd(s, t, labels))
    for label in (-1, 7):
        values = loss(s, jnp.array([0, label, 6, 2, 3]))
        assert np.isnan(values).tolist() == [False, True, False, False, False]
        np.testing.assert_allclose(values[2:], loss(s, jnp.asarray(LABELS))[2:], rtol=1e-6)


def test_wrong_shapes_are_refused():
    logits, labels = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    for wrong in (jnp.zeros((4, 2)), jnp.zeros((3, 3)), jnp.zeros(4), jnp.zeros((4, 3, 1))):
        for loss in (lambda s, t: kd(s, t, temperature=1.0), lambda s, t: dkd(s, t, labels), dist):
            with pytest.raises(jt.InputError, match=r"logits \[batch, classes\] of one shape; got student \(4, 3\)"):
                loss(logits, wrong)
    for wrong in (jnp.zeros(3, jnp.int32), jnp.zeros(4), jnp.zeros((4, 3))):
        with pytest.raises(jt.InputError, match=r"labels must be integers \[batch\], here \(4,\); got"):
            dkd(logits, logits, wrong)
    with pytest.raises(jt.InputError, match=r"mask must have one entry per example, \(4,\); got \(3,\)"):
        dist(logits, logits, mask=jnp.ones(3))
