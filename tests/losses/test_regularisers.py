"""Batch spectral shrinkage, DELTA and Co-Tuning against loops in double precision, and where they degenerate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_checks import QUICK, agree, finite, single

import jaxtransfer as jt

BSS = {k: functools.partial(jt.losses.bss, k=k) for k in (1, 2, 3)}


def shrinkage(features, k=1):
    return np.sum(np.sort(np.linalg.eigvalsh(features @ features.T))[::-1][: min(features.shape)][-k:])


@pytest.mark.parametrize(("shape", "k"), [((5, 8), 1), ((5, 8), 2), ((8, 5), 3), ((4, 4), 2)])
def test_bss(rng, shape, k):
    features = rng.normal(size=shape)
    reference = functools.partial(shrinkage, k=k)
    agree(BSS[k], reference, [features], rng)
    assert float(BSS[k](jnp.float32(features))) == pytest.approx(reference(features), rel=1e-5)


def test_bss_of_features_whose_mean_is_large(rng):
    """In float32 the smallest values keep their digits beside a large one, as they would not in F Fᵀ."""
    features = np.float32(rng.normal(size=(16, 32)) + 100)
    value, gradient = jax.jit(jax.value_and_grad(BSS[2]), compiler_options=QUICK)(features)
    u, s, vt = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    assert float(value) == pytest.approx(np.sum(s[-2:] ** 2), rel=1e-4)
    expected = 2 * (u[:, -2:] * s[-2:]) @ vt[-2:]
    np.testing.assert_allclose(gradient, expected, atol=2e-4 * np.abs(expected).max())


def test_bss_leaves_rows_out(rng):
    features, mask = rng.normal(size=(6, 4)), np.array([1, 0, 1, 1, 0, 1.0])
    for k, rows in ((2, [0, 2, 3, 5]), (2, [1, 4]), (3, [2])):
        mask = np.isin(np.arange(6), rows).astype(np.float32)
        garbage = np.where(mask[:, None] > 0, features, np.nan)
        with jax.enable_x64(True):
            run = jax.jit(jax.value_and_grad(functools.partial(jt.losses.bss, k=k)), compiler_options=QUICK)
            value, gradient = run(jnp.asarray(garbage), mask=jnp.asarray(mask))
        kept = features[rows]
        u, s, vt = np.linalg.svd(kept, full_matrices=False)
        assert float(value) == pytest.approx(np.sum(s[-k:] ** 2), rel=1e-12)
        np.testing.assert_allclose(np.asarray(gradient)[rows], 2 * (u[:, -k:] * s[-k:]) @ vt[-k:], atol=1e-12)
        assert not np.any(np.delete(np.asarray(gradient), rows, axis=0))
    assert float(jt.losses.bss(jnp.ones((3, 4)), mask=jnp.zeros(3))) == 0


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_bss_has_a_second_derivative(rng, shape):
    """Against differences of its gradient, along a direction; with two equal values among those chosen, too."""
    features, direction, h = rng.normal(size=shape), rng.normal(size=shape), 1e-6
    u, s, vt = np.linalg.svd(features, full_matrices=False)
    with jax.enable_x64(True):
        gradient = jax.grad(BSS[2])
        curve = jax.jit(lambda x: jax.jvp(gradient, (x,), (jnp.asarray(direction),))[1], compiler_options=QUICK)

        def closed(x):
            left, values, right = np.linalg.svd(x, full_matrices=False)
            return 2 * (left[:, -2:] * values[-2:]) @ right[-2:]

        for values in (s, [3.0, 2.0, 0.5, 0.5]):
            x = (u * np.asarray(values)) @ vt
            expected = (closed(x + h * direction) - closed(x - h * direction)) / (2 * h)
            np.testing.assert_allclose(curve(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-7)


def test_bss_is_finite_where_values_repeat_or_vanish(rng):
    rank_one = np.outer(rng.normal(size=4), rng.normal(size=4))
    cases = [np.zeros((4, 4)), np.eye(4), rank_one, np.ones((4, 4)), np.diag([2, 1, 1, 0.0])]
    values = finite(lambda x: (BSS[1](x), BSS[3](x)), [(case,) for case in cases])
    np.testing.assert_allclose(
        [[float(v) for v in pair] for pair in values], [[0, 0], [1, 3], [0, 0], [0, 0], [0, 2]], atol=1e-9
    )


@pytest.mark.parametrize(
    ("shape", "k", "message"), [((4,), 1, "batch, dimensions"), ((4, 3), 4, r"\[1, 3\]"), ((4, 3), 0, "got 0")]
)
def test_bss_refuses(shape, k, message):
    with pytest.raises(jt.InputError, match=message):
        jt.losses.bss(jnp.ones(shape), k=k)


def behaviour(maps, source, weight=None):
    """½ Σ_c C w_c mean_p (m − s)², loop by loop."""
    values = np.zeros(len(maps))
    channels = maps.shape[-1]
    for row in range(len(maps)):
        for channel in range(channels):
            share = 1.0 if weight is None else channels * weight[channel]
            values[row] += 0.5 * share * np.mean((maps[row, ..., channel] - source[row, ..., channel]) ** 2)
    return values


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (4, 6)])
def test_delta(rng, shape):
    arrays = [rng.normal(size=shape) for _ in range(2)]
    agree(jt.losses.delta, behaviour, arrays, rng)
    weight = rng.random(shape[-1])
    agree(jt.losses.delta, behaviour, arrays, rng, weight=weight / weight.sum())
    single(jt.losses.delta, behaviour, arrays)


def test_delta_is_the_authors_form(rng):
    """½‖·‖² in the plain form, C/(HW) Σ w_c ½‖·_c‖² with attention; zero, with gradient 0, at the source."""
    maps, source = (np.float32(rng.normal(size=(2, 3, 4, 5))) for _ in range(2))
    total = 0.5 * np.linalg.norm(maps - source) ** 2
    assert float(jnp.sum(jt.losses.delta(maps, source))) * 12 == pytest.approx(total, rel=1e-5)
    weight = np.float32([0.1, 0.2, 0.3, 0.4, 0])
    squares = np.sum(np.square(maps - source), axis=(1, 2))
    expected = 0.5 * 5 / 12 * np.sum(weight * squares)
    assert float(jnp.sum(jt.losses.delta(maps, source, weight=weight))) == pytest.approx(expected, rel=1e-5)
    assert not np.any(jax.grad(lambda x: jnp.sum(jt.losses.delta(x, source)))(jnp.asarray(source)))


def test_delta_refuses():
    maps = jnp.ones((2, 3, 3, 4))
    with pytest.raises(jt.InputError, match="one shape"):
        jt.losses.delta(maps, maps[:, :2])
    with pytest.raises(jt.InputError, match="4 channels; got"):
        jt.losses.delta(maps, maps, weight=jnp.ones(3))
    with pytest.raises(jt.InputError, match="channels"):
        jt.losses.delta(jnp.ones(3), jnp.ones(3))


def relation(logits, labels, relationship):
    """KL(p(s | y) ‖ softmax z), loop by loop."""
    values = []
    for z, y in zip(logits, labels, strict=True):
        target = (
            relationship[int(y)] if np.ndim(y) == 0 else sum(q * row for q, row in zip(y, relationship, strict=True))
        )
        chances = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
        values.append(sum(p * np.log(p / c) for p, c in zip(target, chances, strict=True) if p > 0))
    return np.array(values)


def test_co_tuning(rng):
    logits, relationship = (
        rng.normal(size=(5, 7)),
        rng.random((3, 7)) * (rng.random((3, 7)) > 0.3) + 1e-3 * np.eye(3, 7),
    )
    relationship /= relationship.sum(1, keepdims=True)
    for labels in (rng.integers(0, 3, 5), rng.dirichlet(np.ones(3), 5)):
        given = functools.partial(_with, jt.losses.co_tuning, labels, relationship)
        agree(given, functools.partial(_with, relation, labels, relationship), [logits], rng)
        single_ones = np.float32(logits), np.float32(labels) if labels.ndim == 2 else labels, np.float32(relationship)
        value = jt.losses.co_tuning(*map(jnp.asarray, single_ones))
        np.testing.assert_allclose(value, relation(logits, labels, relationship), rtol=1e-5, atol=1e-6)
        assert value.dtype == jnp.float32


def _with(loss, labels, relationship, logits):
    return loss(logits, labels, relationship)


def test_co_tuning_where_it_degenerates():
    relationship = jnp.asarray([[1.0, 0, 0], [0, 0.5, 0.5]])
    huge = jnp.asarray([[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [0, 0, 0]])
    value, slope = jax.jvp(
        lambda z: jt.losses.co_tuning(z, jnp.asarray([0, 1, 1]), relationship), (huge,), (jnp.ones_like(huge),)
    )
    np.testing.assert_allclose(value, [0, 0, np.log(1.5)], atol=1e-6)
    assert np.all(np.isfinite(slope))
    wrong = jt.losses.co_tuning(huge, jnp.asarray([0, 2, -1]), relationship)
    assert np.isnan(wrong).tolist() == [False, True, True]
    with pytest.raises(jt.InputError, match="relationship"):
        jt.losses.co_tuning(huge, jnp.asarray([0, 1, 1]), relationship[:, :2])
    with pytest.raises(jt.InputError, match="labels must be"):
        jt.losses.co_tuning(huge, jnp.asarray([0, 1]), relationship)
