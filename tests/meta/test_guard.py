"""The derivative of an inner update at gradients of zero: kept where it is finite, left out where it is not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

RATE = 0.1
CLIPS = {
    "": [],
    "value": [optax.clip(0.05)],
    "global norm": [optax.clip_by_global_norm(0.1)],
    "loose global norm": [optax.clip_by_global_norm(50.0)],
    "block rms": [optax.clip_by_block_rms(0.1)],
}
INNER = {
    "sgd": optax.sgd(RATE),
    "momentum": optax.sgd(RATE, momentum=0.9),
    "nesterov": optax.sgd(RATE, momentum=0.9, nesterov=True),
    "rmsprop": optax.rmsprop(RATE, eps=1e-4),
    "adagrad": optax.adagrad(RATE),
    "adagrad from 0": optax.adagrad(RATE, initial_accumulator_value=0.0),
    "adam": optax.adam(RATE),
}


def clipped(clip, inner):
    return optax.chain(*CLIPS[clip], INNER[inner])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def close(got, expected, rtol=1e-8):
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=1e-12)


def grad_of_each(meta_losses, params):
    """The gradients of several functions, compiled together."""
    return jax.jit(lambda p: {name: jax.grad(f)(p) for name, f in meta_losses.items()})(params)


# How far the steps go in all for a small constant gradient of 1, by the formulas of the papers, over the rate.
DISTANCES = {
    "sgd": {1: 1, 3: 3},
    "momentum": {1: 1, 3: 1 + 1.9 + 2.71},
    "nesterov": {1: 1.9, 3: 1.9 + 2.71 + 3.439},
    "rmsprop": {1: 1 / 0.01, 3: 3 / 0.01},
    "adagrad": {1: 1 / np.sqrt(0.1 + 1e-7), 3: 3 / np.sqrt(0.1 + 1e-7)},
    "adam": {1: 0, 3: 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, slow(3)])
@pytest.mark.parametrize("clip", ["", "global norm", slow("value"), slow("block rms")])
def test_examples_of_weight_zero_learn_their_weights(clip, steps, rng, x64):
    """Ren et al. 2018 (arXiv:1803.09050): no gradient but zeros, and the derivative by the weights is a formula."""
    x, v = rng.normal(size=(2, 6, 3))
    y, u = rng.normal(size=(2, 6))
    w = rng.normal(size=3)

    def weighted(w, weights):
        return jnp.sum(weights * (x @ w - y) ** 2)

    def clean(inner):
        def value(weights):
            fast = jt.meta.adapt(weighted, jnp.asarray(w), weights, optimizer=clipped(clip, inner), steps=steps)
            return jnp.mean((v @ fast - u) ** 2)

        return value

    got = grad_of_each({inner: clean(inner) for inner in DISTANCES}, jnp.zeros(6))
    ahead = 2 * (v @ w - u) @ v / 6
    for inner, distance in DISTANCES.items():
        expected = -RATE * distance[steps] * (2 * (x @ w - y)[:, None] * x) @ ahead
        np.testing.assert_allclose(got[inner], expected, rtol=1e-7, err_msg=inner)


def network(rng):
    params = {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=(4, 2))}
    sets = [(rng.normal(size=(6, 3)), rng.normal(size=(6, 2))) for _ in range(2)]
    return jax.tree.map(jnp.asarray, (params, *sets))


def loss(params, batch, nonlinearity=jnp.tanh):
    x, y = batch
    return jnp.mean((nonlinearity(x @ params["w"] + params["b"][None]) @ params["v"] - y) ** 2)


def adapted(params, batch, inner, steps, first_order):
    return jt.meta.adapt(loss, params, batch, optimizer=inner, steps=steps, first_order=first_order)


def plain(params, batch, inner, steps, first_order):
    """The inner loop written out, without any guard."""
    state = inner.init(params)
    for _ in range(steps):
        grads = jax.grad(loss)(params, batch)
        grads = jax.lax.stop_gradient(grads) if first_order else grads
        updates, state = inner.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


FINITE = tuple(name for name in INNER if name != "adam")


@pytest.mark.parametrize(("names", "clip", "steps", "first_order"), [
    (("momentum",), "global norm", 3, False), slow(FINITE, "global norm", 3, False), slow(FINITE, "", 3, False),
    slow(FINITE, "value", 3, False), slow(FINITE, "loose global norm", 3, False), slow(FINITE, "", 1, False),
    slow(FINITE, "global norm", 1, False), slow(FINITE, "value", 3, True), slow(FINITE, "", 1, True),
    (("rmsprop", "adagrad"), "", 1, False),
])  # fmt: skip
def test_a_head_of_zeros_gives_the_meta_gradient_of_the_loop_written_out(names, clip, steps, first_order, rng, x64):
    params, support, query = network(rng)
    params["v"] = jnp.zeros_like(params["v"])  # the body's gradients are exactly zero at first

    def meta_losses(adapt):
        return {
            name: lambda p, name=name: loss(adapt(p, support, clipped(clip, name), steps, first_order), query)
            for name in names
        }

    got, expected = (grad_of_each(meta_losses(adapt), params) for adapt in (adapted, plain))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, slow(np.float64)])
@pytest.mark.parametrize(("clip", "steps"), [("global norm", 1), slow("global norm", 3), slow("", 3), slow("value", 3)])
def test_a_dead_unit_changes_nothing_for_the_others(clip, steps, dtype, rng, x64):
    params, support, query = jax.tree.map(lambda x: x.astype(dtype), network(rng))
    params["b"] = jnp.array([2, -50, 2, 2], dtype)  # the second ReLU never opens
    params["faint"] = jnp.ones(2, dtype)  # gradients whose squares underflow
    alive = {name: jnp.delete(leaf, 1, axis=0 if name == "v" else -1) for name, leaf in params.items()}
    inner = {"adam": INNER["adam"]}
    if steps > 1:
        inner |= {"rmsprop": optax.rmsprop(0.01, eps_in_sqrt=False), "adagrad": INNER["adagrad"]}

    def task_loss(params, batch):
        tiny = np.finfo(dtype).tiny ** 0.7
        return loss(params, batch, jax.nn.relu) + jnp.sum((params["faint"] * tiny) if "faint" in params else 0)

    def meta_losses():
        def meta_loss(optimizer):
            optimizer = optax.chain(*CLIPS[clip], optimizer)
            return lambda p: loss(
                jt.meta.adapt(task_loss, p, support, optimizer=optimizer, steps=3), query, jax.nn.relu
            )

        return {name: meta_loss(optimizer) for name, optimizer in inner.items()}

    whole, without = grad_of_each(meta_losses(), params), grad_of_each(meta_losses(), alive)
    for name in inner:
        got = {k: jnp.delete(leaf, 1, axis=0 if k == "v" else -1) for k, leaf in whole[name].items()}
        close(got, without[name], rtol=1e-10 if dtype == np.float64 else 1e-4)
        assert np.isfinite(jax.tree.leaves(without[name])[0]).all()
        assert all(np.all(leaf == 0) for leaf in (whole[name]["w"][:, 1], whole[name]["b"][1], whole[name]["v"][1]))


@pytest.mark.slow
def test_forward_mode_gives_the_same_derivative(rng, x64):
    params, support, query = network(rng)
    params["v"] = params["v"].at[0].set(0)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

    @jax.jit
    def both(params):
        def value(p):
            return loss(jt.meta.adapt(loss, p, support, optimizer=INNER["adam"], steps=1), query)

        return jax.jvp(value, (params,), (direction,))[1], jax.grad(value)(params)

    along, gradient = both(params)
    expected = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    np.testing.assert_allclose(along, expected, rtol=1e-9)


def test_sgd_pays_nothing_for_it(rng):
    params, support, query = jax.tree.map(lambda x: x.astype(np.float32), network(rng))

    def cost(adapt):
        inner = INNER["momentum"]
        f = jax.jit(jax.grad(lambda p: loss(adapt(p, support, inner, 1, False), query)))
        return f.lower(params).compile().cost_analysis()["flops"]

    assert cost(adapted) == cost(plain)
