"""The contrast of classes against a loop in double precision, and where it degenerates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, inner, moved

import jaxtransfer as jt

LABELS = np.array([0, 2, 2, 5, 1])  # no key is of class 5, one of class 1 is not there
KEY_LABELS = np.array([2, 0, -1, 2, 3, 0, 0, -1, 2])
MASK = np.array([1, 0, 1, 1, 0.5])


def contrast(queries, positives, keys, labels, temperature):
    """Each row by itself: every key of its class is told from all that is there."""
    values = []
    for q, own, label in zip(queries, positives, labels, strict=True):
        there = [own, *keys[KEY_LABELS >= 0]]
        right = [True, *(KEY_LABELS[KEY_LABELS >= 0] == label)]
        scores = [q @ k / np.linalg.norm(q) / np.linalg.norm(k) / temperature for k in there]
        total = np.log(np.sum(np.exp(np.array(scores) - max(scores)))) + max(scores)
        values.append(np.mean([total - score for score, of_class in zip(scores, right, strict=True) if of_class]))
    return np.array(values)


@functools.partial(jax.jit, static_argnames="chunk", compiler_options=QUICK)
def run(arrays, temperature, labels, key_labels, weights, mask, chunk=None):
    def total(arrays, temperature):
        options = {"temperature": temperature, "mask": mask, "chunk": chunk}
        queries, positives, keys = arrays
        values = jt.losses.categorical_contrast(queries, positives, labels, keys, key_labels, **options)
        return jnp.sum(values * weights), values

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(arrays, temperature)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "chunk"), [(0.07, None), (1.3, 2)])
def test_categorical_contrast(rng, temperature, chunk):
    """Values and slopes, by all arrays and the temperature, without and with examples left out."""
    arrays = [rng.normal(size=(5, 4)), 3 * rng.normal(size=(5, 4)), rng.normal(size=(9, 4))]
    weights = rng.normal(size=5)
    for mask in (np.ones(5), MASK):
        keep = mask > 0
        given = [
            np.where(keep[:, None], arrays[0], np.nan),
            np.where(keep[:, None], arrays[1], np.inf),
            arrays[2].copy(),
        ]
        given[2][KEY_LABELS < 0] = np.nan
        with jax.enable_x64(True):
            rest = (jnp.asarray(one) for one in (LABELS, KEY_LABELS, weights, mask))
            (_, values), slopes = run([jnp.asarray(x) for x in given], jnp.float64(temperature), *rest, chunk=chunk)
        slopes = jax.tree.map(np.asarray, slopes)

        def reference(arrays, temperature, keep=keep):
            queries, positives, keys = arrays
            return contrast(queries[keep], positives[keep], keys, LABELS[keep], temperature)

        np.testing.assert_allclose(values[keep], reference(arrays, temperature), rtol=1e-9)
        assert not np.any(values[~keep])
        assert not any(np.any(one[~keep]) for one in slopes[0][:2])
        assert not np.any(slopes[0][2][KEY_LABELS < 0])
        directions, h = [rng.normal(size=x.shape) for x in arrays], 1e-5
        ahead, behind = (
            np.sum(weights[keep] * reference(moved(arrays, directions, s), temperature + s)) for s in (h, -h)
        )
        assert inner(slopes[0], directions) + float(slopes[1]) == pytest.approx((ahead - behind) / (2 * h), rel=1e-6)


@pytest.mark.slow
def test_of_single_precision_and_of_half(rng):
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 4), (5, 4), (9, 4))]
    expected = contrast(*(x.astype(np.float64) for x in arrays), labels=LABELS, temperature=0.07)
    queries, positives, keys = (jnp.asarray(x) for x in arrays)
    labels, key_labels = jnp.asarray(LABELS, jnp.int8), jnp.asarray(KEY_LABELS)
    values = jt.losses.categorical_contrast(queries, positives, labels, keys, key_labels)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    half = jt.losses.categorical_contrast(
        queries.astype(jnp.bfloat16), positives.astype(jnp.bfloat16), labels, keys, key_labels
    )
    assert values.dtype == half.dtype == jnp.float32


@pytest.mark.slow
def test_where_it_degenerates(rng):
    """No keys yet, a query of length 0, equal and opposite vectors at a tiny temperature, no example, a wrong label."""
    x, keys = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    ones, labels = jnp.ones(5), jnp.asarray(LABELS)
    cases = [
        (([x, x, keys], 0.07, labels, jnp.full(9, -1)), np.zeros(5)),
        (([0 * x, x, keys], 0.07, labels, jnp.asarray(KEY_LABELS)), np.full(5, np.log(8))),
        (([x, x, np.repeat(-x[:1], 9, 0)], 1e-4, jnp.zeros(5, int), jnp.zeros(9, int)), [9 / 10 * 2e4]),
        (([x, x, np.repeat(x[:1], 9, 0)], 1e-4, jnp.zeros(5, int), jnp.ones(9, int)), [np.log(10)]),
    ]
    for given, expected in cases:
        (_, values), slopes = run(*given, ones, ones)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((values, slopes)))
        np.testing.assert_allclose(values[: len(expected)], expected, rtol=1e-4, atol=1e-5)
    (_, values), slopes = run([x * np.nan, x, keys], 0.07, labels, jnp.asarray(KEY_LABELS), ones, 0 * ones)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((values, slopes)))
    (_, wrong), _ = run([x, x, keys], 0.07, labels.at[1].set(-1), jnp.asarray(KEY_LABELS), ones, ones)
    assert np.isnan(wrong).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positives": jnp.ones((2, 4))}, "one shape"),
        ({"keys": jnp.ones((2, 4))}, "keys"),
        ({"labels": jnp.ones(2)}, "labels must be integers"),
        ({"labels": jnp.ones(3, int)}, "labels must be integers"),
        ({"key_labels": jnp.ones(3, int)}, "key_labels must be integers"),
        ({"keys": jnp.ones((0, 3)), "key_labels": jnp.ones(0, int)}, "a key or more"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"mask": jnp.ones(3)}, "mask must have one entry"),
    ],
)
def test_refusals(changed, message):
    rows = {name: jnp.ones((2, 3)) for name in ("queries", "positives", "keys")}
    labels = {name: jnp.ones(2, int) for name in ("labels", "key_labels")}
    with pytest.raises(jt.InputError, match=message):
        jt.losses.categorical_contrast(**{**rows, **labels, **changed})
