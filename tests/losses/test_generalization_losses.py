"""Losses over several domains against plain NumPy: values, slopes by differences, masks, split batches, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxtransfer as jt

L = jt.losses
B, D, C = 10, 3, 4
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KEEP = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 1.0])


def cross_entropy(logits, target):
    top = logits.max()
    return -np.sum(target * (logits - top - np.log(np.sum(np.exp(logits - top)))))


def one_hot(labels):
    return np.eye(C)[labels] if np.ndim(labels) == 1 else np.asarray(labels)


def irm_by_differences(logits, labels, weights, h=1e-5):
    """The derivative in the scale is a difference of mean losses: no formula of the code is in it."""
    target, means = one_hot(labels), []
    for half in (0, 1):
        rows = [i for i in range(len(logits)) if i % 2 == half]
        total = sum(weights[i] for i in rows)
        ahead, behind = (
            sum(weights[i] * cross_entropy(s * logits[i], target[i]) for i in rows) / max(total, 1e-300)
            for s in (1 + h, 1 - h)
        )
        means.append((ahead - behind) / (2 * h) if total else 0.0)
    return means[0] * means[1]


def softmax(row):
    row = np.exp(row - row.max())
    return row / row.sum()


def variance_by_examples(features, logits, labels, weights):
    """Each example's gradient as a matrix; then the mean, and the mean square of what differs from it."""
    target = one_hot(labels)
    kernels = [np.outer(f, softmax(z) - q) for f, z, q in zip(features, logits, target, strict=True)]
    biases = [softmax(z) - q for z, q in zip(logits, target, strict=True)]
    found = {}
    for name, gradients in (("kernel", kernels), ("bias", biases)):
        total = sum(weights)
        mean = sum(w * g for w, g in zip(weights, gradients, strict=True)) / total
        found[name] = sum(w * (g - mean) ** 2 for w, g in zip(weights, gradients, strict=True)) / total
    return found


def slopes_agree(loss, reference, arrays, rng, rtol=1e-6):
    """Gradients of a scalar of several arrays, along random directions, against differences of the reference."""
    gradients = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))), compiler_options=QUICK)(*arrays)
    for _ in range(2):
        directions, h = [rng.normal(size=x.shape) for x in arrays], 1e-4
        f = {k: reference(*(x + k * h * d for x, d in zip(arrays, directions, strict=True))) for k in (-2, -1, 1, 2)}
        slope = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        got = sum(float(np.sum(g * d)) for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(got, slope, rtol=rtol, atol=1e-8)


@pytest.fixture
def given(rng):
    return rng.normal(size=(B, D)), 2 * rng.normal(size=(B, C)), rng.integers(0, C, B), rng.dirichlet(np.ones(C), B)


@pytest.mark.parametrize("soft", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", [None, KEEP, KEEP * np.linspace(0.5, 2, B)])
def test_irm(given, soft, mask, x64, rng):
    _, logits, hard, probabilities = given
    labels, weights = probabilities if soft else hard, np.ones(B) if mask is None else mask
    shown = logits.copy()
    if mask is not None:
        shown[mask == 0] = np.nan
    got = jax.jit(lambda z: L.irm(z, jnp.asarray(labels), mask=mask), compiler_options=QUICK)(shown)
    np.testing.assert_allclose(got, irm_by_differences(logits, labels, weights), rtol=1e-7, atol=1e-10)
    slopes_agree(
        lambda z: L.irm(z, jnp.asarray(labels), mask=mask),
        lambda z: irm_in_numpy(z, labels, weights),
        [logits],
        rng,
    )


def irm_in_numpy(logits, labels, weights):
    """Smooth enough for a second difference; held against `irm_by_differences` by the values."""
    target = one_hot(labels)
    slopes = np.array([np.dot(softmax(z) - q, z) for z, q in zip(logits, target, strict=True)])
    halves = [slice(0, None, 2), slice(1, None, 2)]
    return np.prod([np.sum(weights[h] * slopes[h]) / np.sum(weights[h]) for h in halves])


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", [None, KEEP * np.linspace(0.5, 2, B)])
def test_gradient_variance(given, soft, mask, x64, rng):
    features, logits, hard, probabilities = given
    labels, weights = probabilities if soft else hard, np.ones(B) if mask is None else mask
    parts = {"kernel": rng.normal(size=(D, C)), "bias": rng.normal(size=C)}

    def total(found):
        return sum((found[name] * parts[name]).sum() for name in parts)

    def run(f, z):
        found = L.gradient_variance(f, z, jnp.asarray(labels), mask=mask)
        return total(found), found

    shown = [features.copy(), logits.copy()]
    if mask is not None:
        for array in shown:
            array[mask == 0] = np.inf
    found = jax.jit(lambda *arrays: run(*arrays)[1], compiler_options=QUICK)(*shown)
    expected = variance_by_examples(features, logits, labels, weights)
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-10, err_msg=name)
    slopes_agree(
        lambda f, z: run(f, z)[0],
        lambda f, z: total(variance_by_examples(f, z, labels, weights)),
        [features, logits],
        rng,
    )


def test_more_classes_than_are_held_at_once(rng, x64):
    features, logits, labels = rng.normal(size=(5, 2)), rng.normal(size=(5, 37)), rng.integers(0, 37, 5)
    target = np.eye(37)[labels]
    rows = np.stack([np.outer(f, softmax(z) - q) for f, z, q in zip(features, logits, target, strict=True)])
    found = jax.jit(L.gradient_variance, compiler_options=QUICK)(features, logits, labels)
    np.testing.assert_allclose(found["kernel"], rows.var(axis=0), rtol=1e-10)


def test_vrex_and_fishr(rng, x64):
    values = rng.normal(size=5)
    np.testing.assert_allclose(L.vrex(jnp.asarray(values)), np.var(values), rtol=1e-12)
    slopes_agree(L.vrex, np.var, [values], rng)
    stacked = {"kernel": rng.random((3, D, C)), "bias": rng.random((3, C))}

    def reference(kernel, bias):
        flat = np.concatenate([kernel.reshape(3, -1), bias.reshape(3, -1)], axis=1)
        return np.mean([np.mean((row - flat.mean(axis=0)) ** 2) for row in flat])

    def fishr(kernel, bias):
        return L.fishr({"kernel": kernel, "bias": bias})

    arrays = [stacked["kernel"], stacked["bias"]]
    np.testing.assert_allclose(fishr(*map(jnp.asarray, arrays)), reference(*arrays), rtol=1e-12)
    slopes_agree(fishr, reference, arrays, rng)


def test_group_weights(rng):
    weights, values = np.array([0.2, 0.5, 0.3, 0.0]), np.array([1.0, 3.0, -2.0, 9.0])
    expected = weights * np.exp(0.7 * values)
    run = jax.jit(functools.partial(L.group_weights, rate=0.7))
    np.testing.assert_allclose(run(weights, values), expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(run(10 * weights, values), expected / expected.sum(), rtol=1e-5)
    extreme = run(np.ones(4) / 4, np.array([0.0, 1e30, -1e30, 3.0]))
    np.testing.assert_array_equal(extreme, [0, 1, 0, 0])
    np.testing.assert_allclose(L.group_weights(jnp.ones(2), jnp.ones(2), rate=0.0), [0.5, 0.5])


@pytest.mark.slow
def test_degenerate_rows():
    """One example, constant features, identical domains, huge logits, nothing that counts: zero or finite."""
    both = jax.jit(jax.value_and_grad(L.irm), compiler_options=QUICK)
    value, slope = both(jnp.array([[3.0, -1.0]]), jnp.array([0]))  # the other half is empty
    assert float(value) == 0
    np.testing.assert_array_equal(slope, 0)
    value, slope = both(jnp.array([[1e15, -1e15], [-1e18, 1e18]]), jnp.array([1, 0]))
    assert np.all(np.isfinite(slope))
    assert not np.isnan(value)
    masked = jax.jit(jax.value_and_grad(lambda z, y, m: L.irm(z, y, mask=m)), compiler_options=QUICK)
    value, slope = masked(jnp.full((4, 2), jnp.nan), jnp.zeros(4, int), jnp.zeros(4))
    assert float(value) == 0
    np.testing.assert_array_equal(slope, 0)
    assert np.isnan(both(jnp.ones((2, 2)), jnp.array([0, 5]))[0])
    assert np.isfinite(both(jnp.array([[1.0, -jnp.inf], [2.0, 1.0]]), jnp.array([0, 1]))[0])

    def of_variance(f, z, y, m):
        found = L.gradient_variance(f, z, y, mask=m)
        return jnp.sum(found["kernel"]) + jnp.sum(found["bias"])

    variance = jax.jit(jax.value_and_grad(of_variance, argnums=(0, 1)), compiler_options=QUICK)
    same = jnp.tile(jnp.array([[0.3, -2.0]]), (4, 1))
    for mask in (jnp.ones(4), jnp.zeros(4)):
        value, slopes = variance(same, same, jnp.ones(4, int), mask)
        assert float(value) == pytest.approx(0, abs=1e-12)
        assert all(np.abs(slope).max() < 1e-6 for slope in slopes)
    value, slopes = variance(same * 1e4, jnp.array([[1e30, 0], [0, 1e30]] * 2), jnp.ones(4, int), jnp.ones(4))
    assert all(np.all(np.isfinite(slope)) for slope in (value, *slopes))

    alike = {"kernel": jnp.tile(jnp.array([[0.1, 0.7]]), (3, 1))}
    for loss, given in ((L.fishr, alike), (L.vrex, jnp.full(4, 0.3))):
        value, slope = jax.value_and_grad(loss)(given)
        assert float(value) == pytest.approx(0, abs=1e-14)
        assert all(np.abs(leaf).max() < 1e-7 for leaf in jax.tree.leaves(slope))


@pytest.mark.slow
def test_half_precision_is_computed_in_single():
    logits = jnp.array([[1.0, 2.0], [0.5, -1.0]], jnp.bfloat16)
    assert L.irm(logits, jnp.array([0, 1])).dtype == jnp.float32
    assert L.gradient_variance(logits, logits, jnp.array([0, 1]))["bias"].dtype == jnp.float32


@pytest.mark.slow
def test_a_batch_that_is_split_over_devices(rng):
    """Three rows on each of four devices, so that even and odd go by the number in the whole batch."""
    features, logits = rng.normal(size=(12, D)).astype(np.float32), rng.normal(size=(12, C)).astype(np.float32)
    labels, mask = rng.integers(0, C, 12), np.array([1, 0, 1, 1] * 3, np.float32)

    def both(kernel, f, z, y, m, axis):
        def total(kernel):
            found = L.gradient_variance(f, z @ kernel, y, mask=m, axis_name=axis)
            penalty = L.irm(z @ kernel, y, mask=m, axis_name=axis)
            return penalty + 3 * jnp.sum(found["kernel"]) + jnp.sum(found["bias"] ** 2)

        value, slope = jax.value_and_grad(total)(kernel)
        return value, slope if axis is None else jax.lax.pmean(slope, axis)

    kernel = np.eye(C, dtype=np.float32)
    expected = jax.jit(both, static_argnums=5)(kernel, features, logits, labels, mask, None)
    mesh = Mesh(np.array(jax.devices()[:4]), ("rows",))
    rows, whole = PartitionSpec("rows"), PartitionSpec()
    split = jax.shard_map(
        lambda *given: both(*given, "rows"),
        mesh=mesh,
        in_specs=(whole, rows, rows, rows, rows),
        out_specs=whole,
        check_vma=False,
    )
    found = jax.jit(split)(kernel, features, logits, labels, mask)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


def test_refusals():
    z, y = jnp.ones((4, 2)), jnp.zeros(4, int)
    for run, message in (
        (lambda: L.irm(z, y[:3]), "expected logits"),
        (lambda: L.irm(z[0], y), "expected logits"),
        (lambda: L.irm(z, y, mask=jnp.ones(3)), "one entry per example"),
        (lambda: L.irm(z, y, mask=-jnp.ones(4)), "not negative"),
        (lambda: L.gradient_variance(z[:2], z, y), "features must be"),
        (lambda: L.vrex(z), "one value for each domain"),
        (lambda: L.vrex(jnp.ones(0)), "one value for each domain"),
        (lambda: L.group_weights(jnp.ones(2), jnp.ones(3), rate=0.1), "a loss for each weight"),
        (lambda: L.group_weights(jnp.ones(2), jnp.ones(2), rate=-1.0), "rate must be"),
        (lambda: L.fishr({}), "one number of domains"),
        (lambda: L.fishr({"a": z, "b": z[:2]}), "one number of domains"),
    ):
        with pytest.raises(jt.InputError, match=message):
            run()
