import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtransfer.models.cifar_resnet import Block, shortcut_a
from jaxtransfer.models.layers import Layers, avg_pool, global_avg_pool, halve, max_pool


def pool_loop(x, window, reduce):
    batch, height, width, channels = x.shape
    out = np.zeros((batch, height // window, width // window, channels), x.dtype)
    for b, i, j, c in np.ndindex(*out.shape):
        rows, columns = slice(i * window, (i + 1) * window), slice(j * window, (j + 1) * window)
        out[b, i, j, c] = reduce(x[b, rows, columns, c])
    return out


@pytest.mark.parametrize(("size", "window"), [((6, 6), 2), ((7, 5), 2), ((8, 10), 3), ((4, 4), 4), ((3, 3), 1)])
def test_pooling_against_a_loop(size, window):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    most, mean = (jax.jit(pool, static_argnums=1)(x, window) for pool in (max_pool, avg_pool))
    np.testing.assert_array_equal(most, pool_loop(x, window, np.max))
    np.testing.assert_allclose(mean, pool_loop(x, window, np.mean), rtol=1e-5)


def test_max_pool_gradient_is_that_of_reduce_window():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.permutation(2 * 7 * 9 * 3).reshape(2, 7, 9, 3), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, 3, 4, 3)), jnp.float32)

    def reference(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    ours = jax.jit(jax.grad(lambda x: (weights * max_pool(x, 2)).sum()))(x)
    theirs = jax.jit(jax.grad(lambda x: (weights * reference(x)).sum()))(x)
    np.testing.assert_allclose(ours, theirs)


def test_the_first_of_pixels_that_tie_gets_the_gradient():
    x = jnp.asarray([[0.0, 1, 2, 2], [1, 1, 0, 2], [3, 3, -1, -1], [3, 3, -1, -1]])[None, ..., None]
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


@pytest.mark.optimised
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_second_derivatives_through_max_pooling(wrap):
    """Reverse over forward, compiled, of several weights at once, in float64, against differences of gradients."""
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        x, weights = rng.normal(size=(4, 7, 6, 3)), rng.normal(size=(4, 3, 3, 3))
        p, d = rng.normal(size=(2, 5, 2, 3))  # five pairs of scale and shift, and a direction for each

        @wrap
        def f(p):
            return jnp.sum(
                weights * max_pool(jnp.sin(x * p[None, None, :1]) * p[None, None, :1] + p[None, None, 1:], 2) ** 3
            )

        gradients = jax.jit(jax.vmap(jax.grad(f)))
        along = jax.jit(jax.vmap(lambda p, d: jax.grad(lambda p: jax.jvp(f, (p,), (d,))[1])(p)))(p, d)
        h = 1e-6
        np.testing.assert_allclose(along, (gradients(p + h * d) - gradients(p - h * d)) / (2 * h), rtol=1e-5, atol=1e-5)
        other = jax.jit(jax.vmap(lambda p, d: jax.jvp(jax.grad(f), (p,), (d,))[1]))(p, d)
        np.testing.assert_allclose(along, other, rtol=1e-10)
        for one, gradient in zip(p, gradients(p), strict=True):
            np.testing.assert_allclose(jax.grad(f)(one), gradient, rtol=1e-10)


def test_max_pooling_on_a_mesh():
    """Under `shard_map`, and under a mesh of jit: the gradient's bits are those of one device."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(4, 4, 6, 2)), jnp.float32)
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=kinds, devices=jax.devices()[:4])
    rows = jax.P("data")
    gradient = jax.grad(lambda x: (max_pool(x, 2) ** 2).sum())
    wanted = jax.jit(gradient)(x)
    placed = jax.device_put(x, jax.NamedSharding(mesh, rows))
    np.testing.assert_array_equal(jax.jit(gradient)(placed), wanted)
    np.testing.assert_array_equal(jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows))(x), wanted)


def test_what_is_not_differentiated_keeps_no_places():
    """A frozen teacher's pooling is a plain maximum: no integers, one per pixel of the output, are left."""

    def integers(f, *args):
        return len(re.findall(r"s32\[2,2,2,3\]", jax.jit(f).lower(*args).compile().as_text()))

    x = jnp.ones((2, 4, 4, 3))
    assert integers(lambda x: max_pool(x, window=2), x) == 0
    assert integers(jax.grad(lambda w: (w * jax.lax.stop_gradient(max_pool(x, 2))).sum()), x[:, :2, :2]) == 0
    assert integers(jax.grad(lambda x: (max_pool(x, 2) ** 2).sum()), x) > 0


def test_pooling_keeps_what_is_not_finite():
    x = jnp.asarray([[1.0, np.nan, -np.inf, -np.inf], [2, 3, -np.inf, -np.inf]])[None, ..., None]
    np.testing.assert_array_equal(jax.jit(max_pool, static_argnums=1)(x, 2)[0, ..., 0], [[np.nan, -np.inf]])


def test_halve_stops_at_one():
    assert halve(jnp.ones((1, 3, 2, 4))).shape == (1, 1, 1, 4)
    assert halve(jnp.ones((1, 1, 1, 4))).shape == (1, 1, 1, 4)
    assert halve(jnp.ones((1, 5, 1, 4))).shape == (1, 5, 1, 4)


def test_global_mean_accumulates_low_precision():
    x = jnp.full((1, 64, 64, 1), 1.0, jnp.bfloat16)
    assert global_avg_pool(x).dtype == jnp.bfloat16
    assert float(global_avg_pool(x)[0, 0]) == 1.0


@pytest.mark.parametrize(("channels", "filters", "stride"), [(16, 32, 2), (3, 8, 2), (4, 4, 1), (2, 5, 1)])
def test_shortcut_a_against_numpy(channels, filters, stride):
    x = np.random.default_rng(2).normal(size=(2, 5, 6, channels)).astype(np.float32)
    expected = np.zeros((2, -(-5 // stride), -(-6 // stride), filters), np.float32)
    before = (filters - channels) // 2
    for b, i, j, c in np.ndindex(*expected.shape[:3], channels):
        expected[b, i, j, before + c] = x[b, i * stride, j * stride, c]
    np.testing.assert_array_equal(jax.jit(shortcut_a, static_argnums=(1, 2))(x, filters, stride), expected)


def test_block_without_weights_is_its_shortcut():
    x = np.random.default_rng(3).normal(size=(2, 8, 8, 16)).astype(np.float32)
    block = Block(32, 2, Layers(train=False))
    variables = block.init(jax.random.key(0), x)
    variables = variables | {"params": jax.tree.map(jnp.zeros_like, variables["params"])}
    expected = np.pad(np.maximum(x[:, ::2, ::2], 0), ((0, 0), (0, 0), (0, 0), (8, 8)))
    np.testing.assert_allclose(jax.jit(block.apply)(variables, x), expected)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_pads_on_both_sides(size, stride):
    """PyTorch's alignment: output i looks at inputs i * stride - size // 2 and on."""
    x = np.random.default_rng(4).normal(size=(1, 8, 7, 2)).astype(np.float32)
    layer = Layers(train=False).conv(3, size, stride=stride, name="conv")
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = np.asarray(layer.apply(variables, x))
    assert out.shape == (1, -(-8 // stride), -(-7 // stride), 3)
    for i, j in np.ndindex(*out.shape[1:3]):
        patch = padded[0, i * stride : i * stride + size, j * stride : j * stride + size]
        np.testing.assert_allclose(out[0, i, j], np.einsum("hwc,hwcf->f", patch, kernel), atol=1e-4)


def test_weights_are_he_normal_over_fan_out():
    layer: nn.Conv = Layers(train=False).conv(64, 3, name="conv")
    kernel = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 32)))["params"]["kernel"]
    assert abs(float(kernel.std()) / np.sqrt(2 / (9 * 64)) - 1) < 0.02
