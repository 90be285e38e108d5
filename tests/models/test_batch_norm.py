"""Batch norm: the formulas of Flax, and the same bits on any number of devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtransfer.models.batch_norm import BatchNorm, statistics, sum_rows

SHAPES = [(16, 4, 4, 3), (24, 3, 2, 5), (12, 6), (40, 2, 3)]


def variables(rng, channels):
    scale, bias, mean = rng.normal(size=(3, channels)).astype(np.float32)
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": mean**2 + 1}}


def flax_norm(train, **options):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, **options)


def close(got, want, rtol=1e-5, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    chex.assert_trees_all_close(got, want, rtol=rtol, atol=atol)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), got, want)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 3, 2), (3, 2)])
def test_it_equals_flax_with_its_derivatives(rng, shape, train):
    x, weights, v = (rng.normal(1, 2, shape), rng.normal(size=shape), variables(rng, shape[-1]))
    x, weights = x.astype(np.float32), weights.astype(np.float32)

    def loss(module, params, x):
        y, new = module.apply({**v, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y * weights), (y, new)

    got, want = (
        jax.jit(jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0)(module, v["params"], x)
        for module in (BatchNorm(train), flax_norm(train))
    )
    close(got, want, atol=1e-4)


def test_it_begins_as_flax(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    for param_dtype in (jnp.float32, jnp.bfloat16):
        got, want = (
            module.init(jax.random.key(0), x)
            for module in (BatchNorm(True, param_dtype=param_dtype), flax_norm(True, param_dtype=param_dtype))
        )
        close(got, want, 0, 0)


def test_half_precision_has_statistics_of_single_precision(rng):
    x, v = jnp.asarray(rng.normal(3, 1, (64, 8, 8, 4)), jnp.bfloat16), variables(rng, 4)
    for dtype in (jnp.bfloat16, None):
        modules = BatchNorm(True, dtype=dtype), flax_norm(True, dtype=dtype)
        got, want = (module.apply(v, x, mutable=["batch_stats"]) for module in modules)
        close(got[1], want[1])
        assert got[0].dtype == want[0].dtype
        np.testing.assert_allclose(got[0].astype(np.float32), want[0].astype(np.float32), rtol=1e-2, atol=1e-5)
    mean, var = statistics(x)
    assert mean.dtype == var.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-4)


def test_double_precision(rng, x64):
    x = rng.normal(size=(24, 2, 3))
    mean, var = statistics(jnp.asarray(x))
    np.testing.assert_allclose(mean, x.mean((0, 1)), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(var, x.var((0, 1)), rtol=1e-13)


def test_second_derivatives(rng, x64):
    x, direction, v = rng.normal(size=(20, 2, 3)), rng.normal(size=(20, 2, 3)), variables(rng, 3)

    def gradient(module):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(module.apply(v, x, mutable=["batch_stats"])[0]))))

    got, want = (jax.jvp(gradient(m), (x,), (direction,))[1] for m in (BatchNorm(True), flax_norm(True)))
    assert np.abs(want).max() > 1e-2
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    reverse = jax.jit(jax.grad(lambda x: jnp.sum(gradient(BatchNorm(True))(x) * direction)))(x)
    np.testing.assert_allclose(reverse, want, rtol=1e-9, atol=1e-12)


def test_a_constant_channel_has_finite_derivatives():
    v = {"params": {"scale": np.ones(2), "bias": np.zeros(2)}, "batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}

    def loss(x):
        return jnp.sum(jnp.sin(BatchNorm(True).apply(v, x, mutable=["batch_stats"])[0]))

    x = np.full((4, 3, 2), 0.1, np.float32)
    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()
    assert np.isfinite(jax.jit(jax.grad(lambda x: jax.grad(loss)(x).sum()))(x)).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33, 100])
def test_the_sum_of_rows_under_transformations(rng, rows):
    x = rng.integers(-9, 10, (5, rows, 3)).astype(np.float32)  # integers: sums are exact
    np.testing.assert_array_equal(jax.vmap(sum_rows)(x), x.sum(1))
    gradient = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(sum_rows(x) ** 2))))(x)
    np.testing.assert_array_equal(gradient, np.broadcast_to(2 * x.sum(1, keepdims=True), x.shape))


def split_over(devices):
    line = Mesh(np.array(jax.devices()[:devices]), ("batch",), axis_types=(AxisType.Auto,))
    return NamedSharding(line, PartitionSpec()), NamedSharding(line, PartitionSpec("batch"))


@pytest.mark.optimised
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_the_same_on_any_number_of_devices(rng, shape):
    x, v = rng.normal(1, 2, shape).astype(np.float32), variables(rng, shape[-1])

    def forward(v, x, axis=None):
        return BatchNorm(True, axis=axis).apply(v, x, mutable=["batch_stats"])

    want = jax.jit(forward)(v, x)
    for devices in (2, 4):
        whole, split = split_over(devices)
        got = jax.jit(forward, in_shardings=(whole, split))(v, x)
        chex.assert_trees_all_equal(got, want)
    place = {"axis_name": "i", "in_axes": (None, 0), "out_axes": (0, None), "devices": jax.devices()[:4]}
    y, state = jax.pmap(lambda v, x: forward(v, x, "i"), **place)(v, x.reshape(4, -1, *shape[1:]))
    chex.assert_trees_all_equal((y.reshape(shape), state), want)


@pytest.mark.optimised
def test_bits_can_differ(rng):
    """The test above can tell: a plain mean has other bits on four devices."""
    x = rng.normal(1, 2, (16, 4, 4, 64)).astype(np.float32)
    _, split = split_over(4)
    want, got = jax.jit(lambda x: x.mean((0, 1, 2)))(x), jax.jit(lambda x: x.mean((0, 1, 2)), in_shardings=split)(x)
    assert np.any(got != np.asarray(want))


@pytest.mark.optimised
def test_rows_are_sent_in_one_message(rng):
    _, split = split_over(8)
    program = jax.jit(sum_rows, in_shardings=split).lower(np.ones((256, 4), np.float32)).compile().as_text()
    assert program.count(" all-reduce(") == 1
    assert not any(f" {name}(" in program for name in ("all-gather", "collective-permute", "all-to-all"))


@pytest.mark.optimised
@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 20, 25, 48])
def test_a_network_has_the_derivatives_of_plain_sums(rng, x64, rows):
    """Compiled as a whole, where sums meet convolutions."""
    x, label = rng.normal(size=(rows, 8, 8, 2)), rng.integers(0, 3, rows)

    class Net(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x):
            for stride in (1, 2, 2):
                x = nn.Conv(6, (3, 3), strides=stride, param_dtype=jnp.float64)(x)
                norm = BatchNorm(True) if self.norm is BatchNorm else flax_norm(True)
                x = nn.relu(norm.copy(name=f"norm{stride}_{x.shape[1]}")(x))
            return x.mean((1, 2))[:, :3]

    def loss(net, params):
        logits, _ = net.apply({**start, "params": params}, x, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(rows), label])

    start = Net(nn.BatchNorm).init(jax.random.key(0), x)
    both = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
    got, want = (both(Net(norm), start["params"]) for norm in (BatchNorm, nn.BatchNorm))
    close(got, want, 1e-9, 1e-11)
