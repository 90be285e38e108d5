"""The inner loop: values, meta-gradients against finite differences, the guard, memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
}


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"][None])
    return jnp.mean((hidden @ params["v"] - y) ** 2)


def problem(rng, dtype):
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=(4, 1))}
    sets = [(rng.normal(size=(6, 3)), rng.normal(size=(6, 1))) for _ in range(2)]
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, *sets))


def directional_error(f, gradient, params, rng):
    """The relative error of a directional derivative, at the best of four step widths."""
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)  # NumPy's: no program an operation
    params, gradient = jax.tree.map(np.asarray, (params, gradient))
    exact = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    errors = []
    for width in (1e-4, 1e-5, 1e-6, 1e-7):
        ahead, behind = (f(jax.tree.map(lambda p, d: p + s * width * d, params, direction)) for s in (1, -1))  # noqa: B023
        errors.append(abs((ahead - behind) / (2 * width) - exact) / abs(exact))
    return float(min(errors))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [("sgd", 1), ("momentum", 5), ("adam", 5)]
    + [pytest.param(*row, marks=pytest.mark.slow) for row in (("sgd", 5), ("adam", 1), ("adamw", 5))],
)
def test_the_meta_gradient_equals_finite_differences(name, steps, rng, x64):
    params, support, query = problem(rng, jnp.float64)

    @jax.jit
    def outer(params):
        return loss(jt.meta.adapt(loss, params, support, optimizer=OPTIMIZERS[name], steps=steps), query)

    assert directional_error(outer, jax.grad(outer)(params), params, rng) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps", "remat"), [("sgd", 0, False), ("adamw", 7, False), ("momentum", 7, True)])
def test_the_values_are_those_of_a_plain_loop(name, remat, steps, rng):
    params, support, _ = problem(rng, jnp.float32)
    optimizer = OPTIMIZERS[name]
    expected, state = params, jax.jit(optimizer.init)(params)

    @jax.jit
    def updated(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params, support), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        expected, state = updated(expected, state)
    got = jt.meta.adapt(loss, params, support, optimizer=optimizer, steps=steps, remat=remat)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_first_order_gradient_is_that_at_the_adapted_point(rng, x64):
    params, support, query = problem(rng, jnp.float64)
    kwargs = {"optimizer": optax.sgd(0.1), "steps": 3}
    got = jax.jit(jax.grad(lambda p: loss(jt.meta.adapt(loss, p, support, first_order=True, **kwargs), query)))(params)
    adapted = jax.jit(lambda p: jt.meta.adapt(loss, p, support, **kwargs))(params)
    expected = jax.jit(jax.grad(loss))(adapted, query)
    chex.assert_trees_all_close(got, expected, rtol=1e-12)


@pytest.mark.parametrize("steps", [pytest.param(2, marks=pytest.mark.slow), 7])
@pytest.mark.slow
def test_rematerialised_steps_give_the_same_gradient(steps, rng, x64):
    params, support, query = problem(rng, jnp.float64)

    def gradient(remat):
        return jax.grad(
            lambda p: loss(jt.meta.adapt(loss, p, support, optimizer=optax.adam(0.01), steps=steps, remat=remat), query)
        )(params)

    chex.assert_trees_all_close(gradient(True), gradient(False), rtol=1e-10, atol=1e-14)


def test_rematerialised_steps_need_a_quarter_of_the_memory():
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}
    batch = jnp.zeros((200, 64))

    def inner(params, batch):
        return jnp.mean(jnp.tanh(jnp.tanh(batch @ params["a"]) @ params["b"]) ** 2)

    def memory(remat):
        def outer(params):
            return inner(jt.meta.adapt(inner, params, batch, optimizer=optax.sgd(0.1), steps=50, remat=remat), batch)

        return jax.jit(jax.grad(outer)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(True) <= memory(False) / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        (optax.adam(0.01), "float32"),
        pytest.param(optax.adam(0.01), "float64", marks=pytest.mark.slow),
        pytest.param(optax.rmsprop(0.01), "float32", marks=pytest.mark.slow),
    ],
)
def test_dead_units_make_no_nan(optimizer, dtype, rng, x64):
    params, support, query = problem(rng, dtype)
    params["w"] = params["w"].at[:, 0].set(0)
    params["b"] = params["b"].at[0].set(-5)  # this ReLU never opens: its gradients are exactly zero

    def dead_loss(params, batch):
        x, y = batch
        return jnp.mean((jax.nn.relu(x @ params["w"] + params["b"][None]) @ params["v"] - y) ** 2)

    def outer(params):
        return dead_loss(jt.meta.adapt(dead_loss, params, support, optimizer=optimizer, steps=3), query)

    gradient = jax.jit(jax.grad(outer))(params)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))
    assert float(jnp.max(jnp.abs(gradient["w"][:, 0]))) == 0
    assert float(jnp.max(jnp.abs(gradient["w"][:, 1:]))) > 0


def test_negative_steps_are_refused(rng):
    params, support, _ = problem(rng, jnp.float32)
    with pytest.raises(jt.InputError, match="at least 0; got -1"):
        jt.meta.adapt(loss, params, support, optimizer=optax.sgd(0.1), steps=-1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_few_bits_are_adapted_in_many(dtype, rng):
    """By steps that are less than such weights can add, and to a gradient of their own type."""
    params, support, query = problem(rng, jnp.float32)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def outer(params):
        moved = jt.meta.adapt(loss, params, support, optimizer=optax.sgd(1e-4), steps=3)
        return loss(moved, query), moved

    told = jax.jit(jax.value_and_grad(outer, has_aux=True))
    (value, moved), gradient = told(narrow)
    (expected, reference), exact = told(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow))
    chex.assert_trees_all_close(moved, reference, rtol=1e-6)
    assert value == pytest.approx(float(expected), rel=1e-6)
    few = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    chex.assert_trees_all_close(few, exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}
    for name, leaf in moved.items():
        assert np.all(np.asarray(leaf) != np.asarray(narrow[name], np.float32)), name
