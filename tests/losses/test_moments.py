"""CORAL and moments of several domains against loops in NumPy; masks, degenerate sets, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from loss_checks import QUICK, agree_on_domains

import jaxtransfer as jt

coral, moment_distance = jt.losses.coral, jt.losses.moment_distance


def coral_loop(s, t, at, released=False):
    covariances, total, dims = [np.cov(x.T, ddof=1) for x in (s, t)], 0.0, s.shape[1]
    for i in range(dims):
        for j in range(dims):
            total += (covariances[0][i, j] - covariances[1][i, j]) ** 2
    if not released:
        return total / (4 * dims**2)
    return total / dims**2 + sum((s[:, i].mean() - t[:, i].mean()) ** 2 for i in range(dims)) / dims


def moments_loop(*domains, at, moments=2, central=False):
    def of(x):
        found = []
        for power in range(1, moments + 1):
            found.append(np.mean((x - x.mean(0) if central and power > 1 else x) ** power, axis=0))
        return found

    def gap(x, y):
        return sum(np.sqrt(np.sum((a - b) ** 2)) for a, b in zip(of(x), of(y), strict=True))

    *sources, target = domains
    total = sum(gap(source, target) for source in sources) / len(sources)
    pairs = [gap(x, y) for number, x in enumerate(sources) for y in sources[number + 1 :]]
    return total + (np.mean(pairs) if pairs else 0)


def of_sources(*domains, target_mask=None, a=None, b=None, c=None, **options):
    *sources, target = domains
    masks = None if a is None else [a, b, c][: len(sources)]
    return moment_distance(sources, target, source_masks=masks, target_mask=target_mask, **options)


@pytest.fixture
def domains(rng):
    return [(1 + 0.3 * k) * rng.normal(size=(4 + k, 3)) + 0.2 * k for k in range(4)]


def test_coral(rng, domains):
    agree_on_domains(coral, coral_loop, domains[:2], rng)
    agree_on_domains(coral, coral_loop, domains[:2], rng, static=(("released", True),))
    masks = (("source_mask", np.arange(4) != 1), ("target_mask", np.arange(5) % 2 == 0))
    agree_on_domains(coral, coral_loop, domains[:2], rng, masks=masks, static=(("released", True),))


@pytest.mark.slow
def test_moments_of_several_sources(rng, domains):
    agree_on_domains(of_sources, moments_loop, domains, rng)
    masks = [(name, np.arange(4 + k) != k) for k, name in enumerate(("a", "b", "c", "target_mask"))]
    options = (("moments", 4), ("central", True))
    agree_on_domains(of_sources, moments_loop, domains, rng, masks=masks, static=options)
    agree_on_domains(of_sources, moments_loop, domains[:2], rng, static=(("moments", 1),))  # one source: no pairs


def test_degenerate_sets(domains):
    s, t = np.float32(domains[0]), np.float32(domains[1][:4])

    @partial(jax.jit, compiler_options=QUICK)
    def run(s, t, keep):
        def losses(s, t):
            forms = [coral(s, t, target_mask=keep), coral(s, t, released=True, target_mask=keep)]
            return jnp.stack([*forms, moment_distance([s, t], t, source_masks=[None, keep], target_mask=keep)])

        def total(s, t):
            values = losses(s, t)
            return jnp.sum(values), values

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(s, t)

    flat, every, none = np.full_like(s, 0.1), np.ones(4), np.zeros(4)
    for given in ((s, s, every), (flat, flat, every), (0 * s, 0 * s, every), (s, t, none)):
        (_, values), slopes = run(*given)
        np.testing.assert_allclose(values, 0, atol=1e-12)
        for slope in slopes:
            np.testing.assert_allclose(slope, 0, atol=1e-6)
    (_, values), slopes = run(s, t, np.eye(4)[2])  # a single example has a mean alone
    assert values[0] == 0
    np.testing.assert_allclose(values[1], np.mean((s.mean(0) - t[2]) ** 2), rtol=1e-5)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    assert jax.eval_shape(coral, *(jnp.zeros((4, 3), jnp.bfloat16),) * 2).dtype == jnp.float32


@pytest.mark.slow
def test_a_program_for_each_device(rng):
    s, t = np.float32(rng.normal(size=(16, 4))), np.float32(rng.normal(size=(8, 4)) + 1)
    keep, kernel = np.float32(np.arange(16) < 13), np.float32(rng.normal(size=(4, 3)))

    def total(kernel, s, t, keep, axis_name=None):
        s, t = s @ kernel, t @ kernel
        forms = [coral(s, t, released=released, source_mask=keep, axis_name=axis_name) for released in (False, True)]
        several = moment_distance(
            [s, t], 2 * t, moments=3, central=True, source_masks=[keep, None], axis_name=axis_name
        )
        return forms[0] + 2 * forms[1] + several

    expected = jax.jit(jax.value_and_grad(total), compiler_options=QUICK)(kernel, s, t, keep)
    mesh, split = Mesh(np.array(jax.devices()[:4]), ("devices",)), PartitionSpec("devices")
    run = partial(total, axis_name="devices")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), split, split, split), out_specs=PartitionSpec())
    found = jax.jit(jax.value_and_grad(mapped), compiler_options=QUICK)(kernel, s, t, keep)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((4, 3))
    for loss in (coral, lambda s, t: moment_distance([s], t)):
        with pytest.raises(jt.InputError, match=r"features \[examples, dim\] of one dim; got \(4, 3\) and \(4, 2\)"):
            loss(x, x[:, :2])
    with pytest.raises(jt.InputError, match="one source or more and one moment or more; got 0 and 2"):
        moment_distance([], x)
    with pytest.raises(jt.InputError, match="a mask, or None, for each of 2 sources; got 1"):
        moment_distance([x, x], x, source_masks=[None])
