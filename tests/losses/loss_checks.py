"""Checks shared by the distillation losses: against a reference in NumPy, its slopes, and where examples degenerate."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # run once, so compile fast


def moved(arrays, directions, step):
    return jax.tree.map(lambda x, d: x + step * d, arrays, directions)


def inner(one, other):
    one, other = jax.tree.leaves(one), jax.tree.leaves(other)
    return sum(float(np.sum(np.asarray(x) * np.asarray(y))) for x, y in zip(one, other, strict=True))


@cache
def weighted(loss):
    """(weighted sum, values), gradients: compiled once per loss, whatever the options are."""

    def total(arrays, weights, options):
        values = loss(*arrays, **options)
        return jnp.sum(values * weights), values

    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)


def agree(loss, reference, arrays, rng, *, keep=None, **options):
    """Values, and slopes along random directions, of `loss` in double precision are those of `reference`, plain NumPy.

    `arrays` are those that are differentiated, floats; integers go among the options: `agree(loss, reference, [logits],
    rng, labels=labels)`. With `keep` the examples it is false for hold garbage, are masked, and are unknown to the
    reference.
    """
    kept = arrays if keep is None else jax.tree.map(lambda x: x[keep], arrays)
    expected = np.asarray(reference(*kept, **options))
    weights = rng.normal(size=expected.shape)  # tells examples apart
    masked = {} if keep is None else {"mask": jnp.asarray(keep, jnp.float32)}
    if keep is not None:
        arrays = [np.array(x) for x in arrays]
        for number, garbage in enumerate(arrays):
            garbage[~keep] = np.inf if number else np.nan
    with jax.enable_x64(True):
        given = [jax.tree.map(jnp.asarray, part) for part in (arrays, weights, options)]
        (_, values), gradients = weighted(loss)(given[0], given[1], given[2] | masked)
    assert values.dtype == jnp.float64
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-14)
    if keep is not None:
        assert not any(np.any(np.asarray(g)[~keep]) for g in gradients)
        gradients = [np.asarray(g)[keep] for g in gradients]
    for _ in range(3):
        directions, h = jax.tree.map(lambda x: rng.normal(size=x.shape), kept), 1e-4
        f = {k: np.sum(weights * reference(*moved(kept, directions, k * h), **options)) for k in (-2, -1, 1, 2)}
        slope = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        np.testing.assert_allclose(inner(gradients, directions), slope, rtol=1e-7, atol=1e-9)


def agree_masked(loss, reference, arrays, rng, **options):
    """`agree` for a loss of the whole batch, without and with examples left out; 0 where all are."""
    count = len(arrays[0])
    assert np.ndim(reference(*arrays, **options)) == 0, "for a loss of the whole batch; agree(keep=...) is for others"
    agree(loss, reference, arrays, rng, keep=np.ones(count, bool), **options)
    agree(loss, reference, arrays, rng, keep=np.arange(count) % 3 != 1, **options)
    with jax.enable_x64(True):
        given = [jnp.full(x.shape, jnp.nan, jnp.float64) for x in arrays]
        options = jax.tree.map(jnp.asarray, options) | {"mask": jnp.zeros(count, jnp.float32)}
        for leaf in jax.tree.leaves(weighted(loss)(given, jnp.ones((), jnp.float64), options)):
            np.testing.assert_array_equal(leaf, 0)


def single(loss, reference, arrays, rtol=1e-5):
    """In float32 under `vmap`, over two different batches, the values are those of the reference."""
    pair = [arrays, jax.tree.map(lambda x: x[::-1] * 0.5, arrays)]
    together = jax.tree.map(lambda *leaves: jnp.stack([jnp.float32(x) for x in leaves]), *pair)
    values = jax.jit(jax.vmap(lambda arrays: loss(*arrays)), compiler_options=QUICK)(together)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [reference(*arrays) for arrays in pair], rtol=rtol, atol=1e-7)
    total = jax.value_and_grad(lambda arrays: jnp.sum(loss(*arrays)))  # types: nothing is compiled
    student, *others = jax.tree.map(jnp.float32, arrays)
    value, gradients = jax.eval_shape(total, (jax.tree.map(jnp.bfloat16, student), *others))
    assert value.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(gradients[0]))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients[1:]))


def finite(losses, cases):
    """Values, gradients and second derivatives are finite in float32 for every tuple of arrays; returns the values."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(arrays):
        def total(arrays):
            values = losses(*arrays)
            return sum(jnp.sum(value) for value in values), values

        slopes = jax.grad(total, has_aux=True)
        (slope, values), (curve, _) = jax.jvp(slopes, (arrays,), (jax.tree.map(lambda x: jnp.cos(x) + 1, arrays),))
        return values, slope, curve

    found = []
    for number, arrays in enumerate(cases):
        results = run(jax.tree.map(jnp.float32, arrays))
        for leaf in jax.tree.leaves(results):
            assert np.all(np.isfinite(leaf)), f"case {number}: {results}"
        found.append(jax.tree.map(np.asarray, results[0]))
    return found


@cache
def sloped(loss, static):
    """Value and gradients by all arrays of a scalar loss of domains: compiled once per loss and static options."""
    return jax.jit(
        jax.value_and_grad(lambda arrays, options: loss(*arrays, **options, **dict(static))), compiler_options=QUICK
    )


def agree_on_domains(loss, reference, arrays, rng, *, masks=(), static=(), **options):
    """A scalar `loss` of domains of unequal size, and its slopes, in double precision are those of `reference`.

    The reference is told where it stands, `at=arrays`, as what is not differentiated stays there. With `masks`, names
    and booleans, one for each array, what they are false for holds garbage and is unknown to the reference.
    """
    kept = [x[keep] for x, (_, keep) in zip(arrays, masks, strict=True)] if masks else arrays
    given = (
        [np.where(keep[:, None], x, np.nan) for x, (_, keep) in zip(arrays, masks, strict=True)] if masks else arrays
    )
    known = {**options, **dict(static)}
    with jax.enable_x64(True):
        told = {name: jnp.asarray(keep) for name, keep in masks} | jax.tree.map(jnp.asarray, options)
        value, slopes = sloped(loss, tuple(static))(jax.tree.map(jnp.asarray, list(given)), told)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, reference(*kept, at=kept, **known), rtol=1e-9, atol=1e-14)
    if masks:
        assert not any(np.any(np.asarray(g)[~keep]) for g, (_, keep) in zip(slopes, masks, strict=True))
        slopes = [np.asarray(g)[keep] for g, (_, keep) in zip(slopes, masks, strict=True)]
    for _ in range(3):
        directions, h = [rng.normal(size=x.shape) for x in kept], 1e-4
        f = {k: reference(*moved(list(kept), directions, k * h), at=kept, **known) for k in (-2, -1, 1, 2)}
        slope = (8 * (f[1] - f[-1]) - (f[2] - f[-2])) / (12 * h)
        np.testing.assert_allclose(inner(slopes, directions), slope, rtol=1e-7, atol=1e-10)
    return float(value)
