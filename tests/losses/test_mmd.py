"""Maximum mean discrepancy against loops over all pairs; unequal sizes, masks, degenerate sets, memory, devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from loss_checks import QUICK, agree_on_domains

import jaxtransfer as jt

mmd, jmmd = jt.losses.mmd, jt.losses.jmmd


def squares(rows):
    return np.array([[np.sum((x - y) ** 2) for y in rows] for x in rows])


def joint_loop(s, t, at, alphas, sigmas=None, linear=False, offset=True):
    """By the matrix of all pairs of both sets together, as the library in PyTorch has it; `s` and `t` are layers."""
    n, m, kernel = len(s[0]), len(t[0]), 1.0
    for number, own in enumerate(alphas):
        distances = squares(np.concatenate([s[number], t[number]]))
        variance = squares(np.concatenate([at[0][number], at[1][number]])).mean()
        if sigmas is not None and sigmas[number] is not None:
            own, variance = (1.0,), sigmas[number] ** 2
        kernel = kernel * sum(np.exp(-distances / (2 * alpha * variance)) for alpha in own)
    total = (1 / (n - 1) + 1 / (m - 1)) * offset
    for i in range(n + m):
        for j in range(n + m):
            if not linear and i != j:
                own, count = (i < n) == (j < n), n if i < n else m
                total += kernel[i, j] * (1 / (count * (count - 1)) if own else -1 / (n * m))
    for i in range(n if linear else 0):
        after = (i + 1) % n
        total += (kernel[i, after] + kernel[n + i, n + after] - kernel[i, n + after] - kernel[after, n + i]) / n
    return total


def loop(s, t, at, alphas=(0.5, 1.0, 2.0), **options):
    return joint_loop((s,), (t,), [(x,) for x in at], (alphas,), **options)


def of_two_layers(s, t, **options):
    """The first two dimensions as a layer, the others as another."""
    return jmmd((s[:, :2], s[:, 2:]), (t[:, :2], t[:, 2:]), **options)


def loop_of_two_layers(s, t, at, alphas=((0.5, 1.0, 2.0),) * 2, **options):
    def layers(x):
        return x[:, :2], x[:, 2:]

    return joint_loop(layers(s), layers(t), [layers(x) for x in at], alphas, **options)


@pytest.fixture
def domains(rng):
    return rng.normal(size=(7, 5)), 1.5 * rng.normal(size=(5, 5)) + 0.7


@pytest.mark.slow
def test_all_pairs_of_domains_of_unequal_size(rng, domains):
    agree_on_domains(mmd, loop, domains, rng)
    agree_on_domains(mmd, loop, domains, rng, static=(("alphas", (0.3, 1.7)), ("offset", False)))


@pytest.mark.slow
def test_examples_left_out(rng, domains):
    masks = (("source_mask", np.arange(7) % 3 != 1), ("target_mask", np.arange(5) != 0))
    agree_on_domains(mmd, loop, domains, rng, masks=masks)


def test_linear_time(rng, domains):
    s, t = domains
    agree_on_domains(mmd, loop, (s[:5], t), rng, static=(("linear", True),))
    masks = (("source_mask", np.array([1, 1, 0, 1, 1]) > 0), ("target_mask", np.array([0, 1, 1, 1, 1]) > 0))
    agree_on_domains(mmd, loop, (s[:5], t), rng, masks=masks, static=(("linear", True),))


@pytest.mark.slow
def test_joint_layers(rng, domains):
    agree_on_domains(of_two_layers, loop_of_two_layers, domains, rng)
    as_trained = (("alphas", ((0.125, 0.25, 0.5, 1.0, 2.0), (1.0,))), ("sigmas", (None, 0.92)))
    agree_on_domains(of_two_layers, loop_of_two_layers, domains, rng, static=as_trained)
    s, t = domains
    agree_on_domains(of_two_layers, loop_of_two_layers, (s[:5], t), rng, static=(*as_trained, ("linear", True)))


@pytest.mark.slow
def test_tiles_of_any_size_and_the_gradient_of_the_gradient(domains, x64):
    s, t = map(jnp.asarray, domains)

    def whole(s, t):
        """Without tiles, as a matrix that JAX differentiates."""
        z = jnp.concatenate([s, t])
        distances = jnp.sum((z[:, None] - z[None]) ** 2, -1)
        variance = jax.lax.stop_gradient(distances.mean())
        kernel = sum(jnp.exp(-distances / (2 * alpha * variance)) for alpha in (0.5, 1.0, 2.0))
        own = (jnp.arange(12)[:, None] < 7) == (jnp.arange(12)[None] < 7)
        count = jnp.where(jnp.arange(12) < 7, 7, 5)[:, None]
        weights = jnp.where(own, 1 / (count * (count - 1)), -1 / 35) * (1 - jnp.eye(12))
        return jnp.sum(weights * kernel) + 1 / 6 + 1 / 4

    def everything(loss):
        def steep(s, t):
            value, slopes = jax.value_and_grad(loss, argnums=(0, 1))(s, t)
            return value + sum(jnp.sum(jnp.cos(3 * slope)) for slope in slopes), slopes

        return jax.jit(jax.value_and_grad(steep, argnums=(0, 1), has_aux=True), compiler_options=QUICK)(s, t)

    expected = everything(whole)
    for chunk in (2, 64):
        found = everything(lambda s, t, chunk=chunk: mmd(s, t, chunk=chunk))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_single_precision_far_from_the_origin_and_out_of_range(rng, domains):
    run = jax.jit(jax.value_and_grad(mmd, argnums=(0, 1)), compiler_options=QUICK)
    s, t = (np.float32(x) for x in domains)
    exact, slopes = run(s, t)
    assert exact.dtype == jnp.float32
    np.testing.assert_allclose(exact, loop(s, t, (s, t)), rtol=1e-5)
    for scale in (1e25, 1e-25):
        value, steep = run(np.float32(scale) * s, np.float32(scale) * t)
        np.testing.assert_allclose(value, exact, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(steep[0]) * scale, slopes[0], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(run(s + 100, t + 100)[0], exact, rtol=1e-4)
    half = jax.eval_shape(jax.value_and_grad(mmd), *(jnp.zeros(x.shape, jnp.bfloat16) for x in domains))
    assert half[0].dtype == jnp.float32
    assert half[1].dtype == jnp.bfloat16


def test_degenerate_sets(rng, domains):
    @partial(jax.jit, compiler_options=QUICK)
    def run(s, t, source_mask, target_mask):
        masks = {"source_mask": source_mask, "target_mask": target_mask}
        linear = jax.value_and_grad(lambda s, t: mmd(s, t, linear=True, **masks), argnums=(0, 1))
        joint = jax.value_and_grad(lambda s, t: of_two_layers(s, t, **masks), argnums=(0, 1))
        return jax.value_and_grad(lambda s, t: mmd(s, t, **masks), argnums=(0, 1))(s, t), linear(s, t), joint(s, t)

    s = np.float32(domains[1])
    every, one, none = np.ones(5), np.eye(5)[2], np.zeros(5)
    flat = np.full_like(s, 0.1)
    for given in ((flat, flat, every, every), (0 * s, 0 * s, every, every), (s, flat, one, every), (s, s, every, none)):
        for leaf in jax.tree.leaves(run(*given)):
            np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves(run(s, s, every, every)):  # equal sets: the estimate is not 0 there
        assert np.all(np.isfinite(leaf))
    ring, _ = run(s, s, every, every)[1]
    np.testing.assert_allclose(ring, 2 / 4, rtol=1e-6)
    ones = jax.tree.leaves(run(s[:1], s[1:2], every[:1], every[:1]))
    assert not any(np.any(leaf) for leaf in ones)


@pytest.mark.optimised  # what a compiler that doesn't optimise holds is another matter
def test_memory_is_linear_in_the_batch():
    """4,096 × 512 against as many: no matrix of pairs, and twice the examples take twice the memory."""

    def compiled(size, dim, chunk):
        x = jax.ShapeDtypeStruct((size, dim), jnp.float32)
        return jax.jit(jax.value_and_grad(lambda s, t: mmd(s, t, chunk=chunk), argnums=(0, 1))).lower(x, x).compile()

    temporary = {}
    for size in (4096, 8192):
        program = compiled(size, 512, 512)
        temporary[size] = program.memory_analysis().temp_size_in_bytes
        assert not re.search(rf"f32\[{size},{size}\]|f32\[{2 * size},{2 * size}\]", program.as_text())
    copies = 2 * 4096 * 512 * 4  # of both batches
    assert temporary[4096] < 5 * copies
    assert temporary[8192] < 2.1 * temporary[4096]


@pytest.mark.slow
def test_rows_stay_on_their_device(rng):
    s, t = np.float32(rng.normal(size=(32, 4))), np.float32(rng.normal(size=(16, 4)) + 1)
    rows = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
    whole = jax.value_and_grad(lambda s, t: mmd(s, t, chunk=8), argnums=(0, 1))
    expected = jax.jit(whole, compiler_options=QUICK)(s, t)
    found = jax.jit(whole, in_shardings=rows, compiler_options=QUICK)(s, t)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True])
def test_a_program_for_each_device(rng, linear):
    count = 12
    s, t = np.float32(rng.normal(size=(16, 4))), np.float32(rng.normal(size=(16 if linear else 8, 4)) + 1)
    keep, kernel = np.float32(np.arange(16) < count), np.float32(rng.normal(size=(4, 3)))

    def total(kernel, s, t, keep, axis_name=None):
        return mmd(s @ kernel, t @ kernel, linear=linear, source_mask=keep, axis_name=axis_name)

    expected = jax.jit(jax.value_and_grad(total), compiler_options=QUICK)(kernel, s, t, keep)
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))
    split = PartitionSpec("devices")

    def run(kernel, *rows):
        return jax.lax.pmean(total(kernel, *rows, axis_name="devices"), "devices")

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(PartitionSpec(), split, split, split), out_specs=PartitionSpec())
    found = jax.jit(jax.value_and_grad(mapped), compiler_options=QUICK)(kernel, s, t, keep)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused():
    x, y = jnp.zeros((4, 3)), jnp.zeros((5, 3))
    with pytest.raises(jt.InputError, match=r"got \(4, 3\) and \(4, 2\)"):
        mmd(x, x[:, :2])
    with pytest.raises(jt.InputError, match=r"linear time pairs the examples up.*got 4 and 5"):
        mmd(x, y, linear=True)
    with pytest.raises(jt.InputError, match=r"mask must have one entry per example, \(5,\)"):
        mmd(x, y, target_mask=jnp.ones(4))
    with pytest.raises(jt.InputError, match="an alpha must be positive and finite; got 0"):
        mmd(x, y, alphas=(1.0, 0.0))
    with pytest.raises(jt.InputError, match="alphas are numbers, or one sequence of them for each of 2 layers"):
        jmmd((x, x), (y, y), alphas=((1.0,),))
    with pytest.raises(jt.InputError, match="as many of source and target"):
        jmmd((x, x), (y,))
    with pytest.raises(jt.InputError, match=r"the same in all layers; got \(5, 3\) and \(5, 3\)"):
        jmmd((x, y), (y, y))
