"""The probe beside an objective: its value, what it trains, what it leaves alone, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.errors import InputError
from tests import gradients

KEY = jax.random.key(0)


def batch(rng, rows=6):
    images = {name: rng.normal(size=(rows, 4, 4, 1)).astype(np.float32) for name in ("image", "image2")}
    return {**images, "label": rng.integers(0, 3, rows).astype(np.int32)}


def network(runs=None):
    """A perceptron with a projection, which notes the rows of each run."""
    base = jt.models.mlp(3, hidden=(8,))

    def apply(variables, inputs, **options):
        if runs is not None:
            runs.append(len(inputs))
        return base.apply(variables, inputs, **options)

    net = jt.Model(base.init, apply, base.name, base.stages)
    return jt.models.with_heads(net, projection=jt.models.head(8, 4))


def by_hand(features, weights, labels):
    """The mean cross-entropy of a linear classifier on standardised rows, example by example."""
    total = 0.0
    for x, y in zip(np.asarray(features, np.float64), labels, strict=True):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        scores = x @ np.asarray(weights["kernel"], np.float64) + np.asarray(weights["bias"], np.float64)
        total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[y]
    return total / len(labels)


@pytest.mark.slow
def test_value_and_masked_rows():
    rng = np.random.default_rng(0)
    net, data = network(), batch(rng)
    probe = jt.online_probe(net, 3)
    params, state = probe.init(KEY, data)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params["model_probe"]))
    params["model_probe"] = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), params["model_probe"])
    ctx = jt.Context(train=False)
    run = jax.jit(lambda params, data: probe(params, state, data, ctx))
    value, _, metrics = run(params, data)
    outputs, _ = net.apply({"params": params["model"], **state["model"]}, data["image"], train=False, key=None)
    assert float(value) == pytest.approx(by_hand(outputs["features"], params["model_probe"], data["label"]), rel=1e-5)
    assert set(metrics) == {"probe", "accuracy"}

    data["image"][4:] = np.nan
    masked = {**data, "mask": np.array([1, 1, 1, 1, 0, 0], np.float32)}
    slopes = jax.jit(jax.grad(lambda p: run(p, masked)[0]))(params)
    expected = by_hand(outputs["features"][:4], params["model_probe"], data["label"][:4])
    assert float(run(params, masked)[0]) == pytest.approx(expected, rel=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.slow
def test_beside_an_objective_it_shares_the_run_and_leaves_the_model_alone():
    runs: list[int] = []
    net, data = network(runs), batch(np.random.default_rng(1))
    alone = jt.simclr(net)
    both = alone + jt.online_probe(net, 3, beside=alone)
    params, state = both.init(KEY, data)
    params["model_probe"]["kernel"] = jnp.ones((8, 3)) * jnp.arange(3.0)[None]
    runs.clear()
    one_by_one = functools.partial(jax.jit, compiler_options=gradients.UNFUSED)  # to the bit, as eagerly
    slopes = one_by_one(jax.grad(lambda p: both(p, state, data, jt.Context())[0]))(params)
    assert runs == [12]
    expected = one_by_one(jax.grad(lambda p: alone(p, state, data, jt.Context())[0]))(params)
    for ours, theirs in zip(*map(jax.tree.leaves, (slopes["model"], expected["model"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slopes["model_probe"]))


@pytest.mark.slow
def test_it_learns_from_features_that_stay():
    rng = np.random.default_rng(2)
    data = batch(rng, 30)
    data["image"] += 4 * np.eye(4)[data["label"]][:, :, None, None]
    net, optimizer = network(), optax.adam(0.1)
    probe = jt.online_probe(net, 3)
    state, step = jt.init(probe, optimizer, KEY, data), jt.train_step(probe, optimizer)
    before = jax.tree.map(np.array, state.params["model"])
    for _ in range(40):
        state, metrics = step(state, data)
    assert float(metrics["accuracy"]) > 0.95
    for ours, theirs in zip(*map(jax.tree.leaves, (before, state.params["model"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_refusals():
    rng = np.random.default_rng(3)
    net, data = network(), batch(rng)
    with pytest.raises(InputError, match="one class or more apart; got 0"):
        jt.online_probe(net, 0)
    with pytest.raises(InputError, match="doesn't run model 'model'"):
        jt.online_probe(network(), 3, beside=jt.simclr(net))
    with pytest.raises(InputError, match=r"labels must be in \[0, 2\)"):
        jt.init(jt.online_probe(net, 2), optax.sgd(1.0), KEY, {**data, "label": np.full(6, 2)})
    with pytest.raises(InputError, match="unknown output of model 'model' 'featuers'"):
        jt.init(jt.online_probe(net, 3, tap="featuers"), optax.sgd(1.0), KEY, data)
