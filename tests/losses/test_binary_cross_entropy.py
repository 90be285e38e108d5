"""Binary cross-entropy of many labels against loops in double precision, and its slopes; huge and infinite logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import agree, single

import jaxtransfer as jt


def reference(logits, targets, label_smoothing=0.0, pos_weight=None):
    """One example and one label at a time."""
    values = []
    for row, target in zip(np.asarray(logits, np.float64), np.asarray(targets, np.float64), strict=True):
        total = 0.0
        for label, (x, y) in enumerate(zip(row, target, strict=True)):
            q = (1 - label_smoothing) * y + label_smoothing / 2
            p = 1 / (1 + np.exp(-x))
            weight = 1.0 if pos_weight is None else pos_weight[label]
            total -= weight * q * np.log(p) + (1 - q) * np.log(1 - p)
        values.append(total / len(row))
    return np.array(values)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"pos_weight": np.array([0.5, 3, 0, 1])}], ids=str)
def test_value_and_slope(rng, options):
    agree(
        jt.losses.binary_cross_entropy,
        reference,
        [rng.normal(scale=3, size=(5, 4)), rng.random((5, 4))],
        rng,
        **options,
    )


def test_in_single_precision(rng):
    single(jt.losses.binary_cross_entropy, reference, [rng.normal(scale=3, size=(5, 4)), rng.random((5, 4))])


def test_huge_logits():
    logits = jnp.array([[200.0, -200.0], [-200.0, 200.0], [np.inf, -np.inf]], jnp.bfloat16)
    got = jt.losses.binary_cross_entropy(logits, np.array([[True, False], [True, False], [True, False]]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [0, 200, 0], rtol=1e-6)
    assert jt.losses.binary_cross_entropy(jnp.full((1, 1), -jnp.inf), np.ones((1, 1)))[0] == np.inf


def test_answers():
    got = jt.losses.answers_right(jnp.array([[0.1, -0.1, 0.0, np.nan]]), np.array([[0.9, 1, 0, 0]]))
    np.testing.assert_array_equal(got, [[1, 0, 1, 0]])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(jt.InputError, match="a target of 0 or 1 for each label"):
        jt.losses.binary_cross_entropy(jnp.zeros((3, 2)), np.array([0, 1, 1]))
    with pytest.raises(jt.InputError, match="pos_weight must have one entry for each of the 2 labels"):
        jt.losses.binary_cross_entropy(jnp.zeros((3, 2)), np.zeros((3, 2)), pos_weight=[1.0])
