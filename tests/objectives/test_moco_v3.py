"""MoCo v3 against its formula, written out; its average; its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(4)
B, D, C = 6, 5, 3
TAU = 0.3


def network(dtype=jnp.float32):
    """Three matrices: an encoder with a projection, and a prediction of it; its predictions have another dimension."""

    def init(key, x):
        keys = jax.random.split(key, 3)
        shapes = {"w": (D, C), "v": (C, C), "p": (C, C)}
        return {"params": {n: jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}}

    def apply(variables, x, *, train, key):
        params = variables["params"]
        z = jnp.tanh(x.astype(dtype) @ params["w"]) @ params["v"]
        return {"projection": z, "prediction": z @ params["p"]}, {}

    return jt.Model(init, apply, name="net")


def a_batch(seed=0):
    x = np.random.default_rng(seed).normal(size=(2, B, D)).astype(np.float32)
    return {"image": x[0], "image2": x[0] + 0.4 * x[1]}


def forward(w, x):
    """In float64: the projections and the predictions."""
    z = np.tanh(np.float64(x) @ w["w"]) @ w["v"]
    return z, z @ w["p"]


def unit(z):
    return z / np.sqrt((z**2).sum(-1, keepdims=True))


def reference(fast, slow, batch, keep=range(B), temperature=TAU):
    """Algorithm 1 of the paper as loops: symmetric, its cross-entropy times 2τ, over the kept examples."""
    total = 0.0
    for one, other in (("image", "image2"), ("image2", "image")):
        q, k = unit(forward(fast, batch[one])[1]), unit(forward(slow, batch[other])[0])
        for i in keep:
            scores = [np.exp(q[i] @ k[j] / temperature) for j in keep]
            total += -2 * temperature * np.log(np.exp(q[i] @ k[i] / temperature) / sum(scores)) / len(keep)
    return total


def wide(tree):
    return {name: np.float64(leaf) for name, leaf in tree.items()}


def perturbed(rng, params):
    return {name: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in params.items()}


@pytest.fixture
def start(rng):
    """The objective, weights, an average that is another than they, a batch."""
    objective, batch = jt.moco_v3(network(), temperature=TAU, decay=0.9), a_batch()
    params, state = objective.init(KEY, batch)
    return objective, params, {**state, "net_ema": {"params": perturbed(rng, state["net_ema"]["params"])}}, batch


def test_value_and_gradient_are_the_formula_s(start):
    objective, params, state, batch = start

    def loss(params):
        return objective(params, state, batch, jt.Context(step=0, key=KEY))[0]

    fast, slow = wide(params["net"]), wide(state["net_ema"]["params"])
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, reference(fast, slow, batch), rtol=1e-5)
    for name, leaf in fast.items():
        for place in np.ndindex(leaf.shape):  # each derivative by a central difference of the formula
            ends = []
            for change in (1e-6, -1e-6):
                moved = {**fast, name: leaf.copy()}
                moved[name][place] += change
                ends.append(reference(moved, slow, batch))
            assert grads["net"][name][place] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_temperature(start, temperature):
    _, params, state, batch = start
    value = jt.moco_v3(network(), temperature=temperature)(params, state, batch, jt.Context(step=0, key=KEY))[0]
    expected = reference(wide(params["net"]), wide(state["net_ema"]["params"]), batch, temperature=temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_what_is_masked_out_is_no_negative(start):
    objective, params, state, batch = start
    mask = np.array([1, 0, 1, 1, 0, 1], np.float32)
    spoiled = {name: np.where(mask[:, None] > 0, rows, np.nan) for name, rows in batch.items()}
    value, _, metrics = objective(params, state, {**spoiled, "mask": mask}, jt.Context(step=0, key=KEY))
    expected = reference(wide(params["net"]), wide(state["net_ema"]["params"]), batch, keep=[0, 2, 3, 5])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert float(metrics["moco_v3"].count) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.filterwarnings("ignore:.*stored in bfloat16")
def test_the_slow_network_follows_in_float32(dtype):
    decay, batch = lambda step: 1 - 0.5 / (1 + step), a_batch()
    objective, optimizer = jt.moco_v3(network(dtype), decay=decay), optax.sgd(0.3)
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    slow = np.float64(state.params["net"]["w"])
    for number in range(3):
        if number:  # it moves at the start of a step
            slow = (keep := 1 - 0.5 / (1 + number)) * slow + (1 - keep) * np.float64(state.params["net"]["w"])
        state, _ = step(state, batch)
    got = state.state["net_ema"]["params"]["w"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, slow, rtol=1e-5, atol=1e-6)


def test_what_is_refused():
    net = network()
    with pytest.raises(jt.InputError, match="temperature"):
        jt.moco_v3(net, temperature=0.0)
    with pytest.raises(jt.InputError, match="decay"):
        jt.moco_v3(net, decay=1.5)
    with pytest.raises(jt.InputError, match="two views"):
        jt.moco_v3(net, views=("image",))
    one = {name: rows[:1] for name, rows in a_batch().items()}
    with pytest.raises(jt.InputError, match="two examples or more"):
        jt.init(jt.moco_v3(net), optax.sgd(0.1), KEY, one)
    with pytest.raises(jt.InputError, match="predictoin"):
        jt.init(jt.moco_v3(net, prediction="predictoin"), optax.sgd(0.1), KEY, a_batch())
    few = jt.data.Dataset.from_arrays(np.zeros((4, 2, 2, 1), np.uint8), np.zeros(4, int))
    with pytest.raises(jt.InputError, match="4 examples"):
        jt.fit(jt.moco_v3(net), optax.sgd(0.1), jt.data.pipeline(few, 6), steps=1)
