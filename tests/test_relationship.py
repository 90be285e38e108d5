"""Temperature scaling and the relationship of classes: against a search, loops, and a solution that is known."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

import jaxtransfer as jt


def test_calibration(rng):
    logits = 3 * rng.normal(size=(200, 4))
    labels = np.array([rng.choice(4, p=row) for row in scipy.special.softmax(logits / 2.5, axis=1)])

    def mean(temperature):
        return -scipy.special.log_softmax(logits / temperature, axis=1)[np.arange(200), labels].mean()

    expected = scipy.optimize.minimize_scalar(mean, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-8}).x
    found = jt.methods.calibration_temperature(logits, labels)
    assert found == pytest.approx(expected, rel=1e-5)
    assert 1.5 < found < 4
    right = logits.argmax(1)
    assert jt.methods.calibration_temperature(logits, right, lowest=0.05) == pytest.approx(0.05, rel=1e-6)
    wrong = logits.argmin(1)
    assert jt.methods.calibration_temperature(logits, wrong, highest=30) == pytest.approx(30, rel=1e-6)


def test_direct(rng):
    logits, labels = rng.normal(size=(30, 5)), np.arange(30) % 3
    found = jt.methods.direct_relationship(logits, labels, 3, temperature=1.7)
    for label in range(3):
        rows = [scipy.special.softmax(z / 1.7) for z, y in zip(logits, labels, strict=True) if y == label]
        np.testing.assert_allclose(found[label], np.mean(rows, axis=0), rtol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("classes", [2, 3])
def test_reverse(rng, classes):
    """Against the same classifier fitted by SciPy, and Bayes' rule in loops."""
    logits, labels = 2 * rng.normal(size=(60, 4)), np.arange(60) % classes
    logits[np.arange(60), labels] += 2
    found = jt.methods.reverse_relationship(logits, labels, classes, temperature=0.8, strengths=(0.02,))
    source = scipy.special.softmax(logits / 0.8, axis=1)

    def cost(flat):
        weights = flat.reshape(classes, 4)
        scores = scipy.special.log_softmax(source @ weights.T, axis=1)
        own = np.vstack([weights[1] - weights[0]]) / np.sqrt(1) if classes == 2 else weights
        return -scores[np.arange(60), labels].mean() + 0.02 / 2 * np.sum(own**2)

    weights = scipy.optimize.minimize(cost, np.zeros(classes * 4), tol=1e-10).x.reshape(classes, 4)
    given_source = scipy.special.softmax(weights.T, axis=1)
    expected = np.zeros((classes, 4))
    for label in range(classes):
        for s in range(4):
            expected[label, s] = given_source[s, label] * source[:, s].mean()
        expected[label] /= expected[label].sum()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert found.argmax(1).tolist() == list(range(classes))
    chosen = jt.methods.reverse_relationship(logits, labels, classes, seed=3)
    np.testing.assert_allclose(chosen.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jt.methods.direct_relationship(np.zeros((3, 2)), np.array([0, 0, 2]), 3), "class 1 has none"),
        (lambda: jt.methods.direct_relationship(np.zeros((3, 2)), np.array([0, 1, 2]), 2), r"in \[0, 2\)"),
        (lambda: jt.methods.direct_relationship(np.zeros((3, 2)), np.zeros(2, int), 1), "integer labels"),
        (lambda: jt.methods.direct_relationship(np.zeros((3, 2)), np.zeros(3), 1), "must be integers"),
        (lambda: jt.methods.direct_relationship(np.full((2, 2), np.nan), np.array([0, 1]), 2), "finite"),
        (lambda: jt.methods.direct_relationship(np.zeros((2, 2)), np.array([0, 1]), 2, temperature=0), "temperature"),
        (lambda: jt.methods.reverse_relationship(np.zeros((2, 2)), np.array([0, 1]), 2, strengths=(0,)), "positive"),
        (lambda: jt.methods.reverse_relationship(np.zeros((2, 2)), np.array([0, 0]), 1), "two or more; got 1"),
        (lambda: jt.methods.calibration_temperature(np.zeros((2, 2)), np.array([0, 2])), r"in \[0, 2\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(jt.InputError, match=message):
        call()
