"""Stochastic normalisation: against NumPy in double precision, and the same channels on any devices."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(4)
CHANNELS = 32


class Net(nn.Module):
    """A linear layer, batch norm, dropout, a head."""

    dropout: float = 0.0
    axis: Any = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        x = nn.Dense(CHANNELS, name="body")(x)
        x = jt.models.BatchNorm(train, axis=self.axis, name="norm")(x)
        outputs = {"normalised": x}
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return outputs | {"features": x, "logits": nn.Dense(3, name="head")(x)}


def made(probability, **options):
    model = jt.models.linen(Net(**options), stages=("body|norm", "head"))
    variables = model.init(KEY, np.zeros((1, 5), np.float32))
    rng = np.random.default_rng(7)
    stats = {"mean": rng.normal(size=CHANNELS), "var": 1 + rng.random(CHANNELS)}
    stats = {"norm": {name: jnp.float32(value) for name, value in stats.items()}}
    scaled = {"scale": jnp.float32(1 + rng.random(CHANNELS)), "bias": jnp.float32(rng.normal(size=CHANNELS))}
    variables = {"params": {**variables["params"], "norm": scaled}, "batch_stats": stats}
    return model, jt.models.stoch_norm(model, probability), variables


def normalised(x, mean, var, params):
    return (x - mean) / np.sqrt(var + 1e-5) * np.asarray(params["scale"]) + np.asarray(params["bias"])


def test_each_channel_is_normalised_by_one_or_the_other(rng):
    _, model, variables = made(0.3)
    images = rng.normal(size=(8, 5)).astype(np.float32)
    run = jax.jit(lambda key: model.apply(variables, images, train=True, key=key))
    body = {k: np.asarray(v, np.float64) for k, v in variables["params"]["body"].items()}
    x = images.astype(np.float64) @ body["kernel"] + body["bias"]
    old = {k: np.asarray(v, np.float64) for k, v in variables["batch_stats"]["norm"].items()}
    new = {"mean": 0.9 * old["mean"] + 0.1 * x.mean(0), "var": 0.9 * old["var"] + 0.1 * x.var(0)}
    by_batch = normalised(x, x.mean(0), x.var(0), variables["params"]["norm"])
    by_moving = normalised(x, old["mean"], old["var"], variables["params"]["norm"])
    shares, patterns = [], set()
    for number in range(20):
        outputs, state = run(jax.random.key(number))
        found = np.asarray(outputs["normalised"])
        moving = np.abs(found - by_moving).max(0) < 1e-4
        batch = np.abs(found - by_batch).max(0) < 1e-4
        assert np.all(moving ^ batch)
        shares.append(moving.mean())
        patterns.add(tuple(moving))
        for name, value in new.items():
            np.testing.assert_allclose(state["batch_stats"]["norm"][name], value, rtol=1e-4, atol=1e-5)
    assert 0.24 < np.mean(shares) < 0.36  # 640 draws: 0.3 within 3 standard errors
    assert len(patterns) == 20


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_value_and_gradient_of_either_form(rng, probability, x64):
    """p = 0 is batch norm; p = 1 a fixed affine map, through whose statistics no gradient flows."""
    plain, model, variables = made(probability)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
    images, weights = rng.normal(size=(6, 5)), rng.normal(size=(6, CHANNELS))

    def total(params, which):
        outputs, _ = which.apply({**variables, "params": params}, images, train=True, key=KEY)
        return jnp.sum(outputs["normalised"] * weights)

    value, slope = jax.value_and_grad(total)(variables["params"], model)
    if probability == 0:
        expected, gradient = jax.value_and_grad(total)(variables["params"], plain)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), slope, gradient)
        return
    body, norm = variables["params"]["body"], variables["params"]["norm"]
    x = images @ np.asarray(body["kernel"]) + np.asarray(body["bias"])
    stats = variables["batch_stats"]["norm"]
    mean, var = np.asarray(stats["mean"]), np.asarray(stats["var"])
    np.testing.assert_allclose(value, np.sum(weights * normalised(x, mean, var, norm)), rtol=1e-6)
    factor = np.asarray(norm["scale"]) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(slope["body"]["kernel"], images.T @ (weights * factor), rtol=1e-6)
    np.testing.assert_allclose(slope["norm"]["scale"], np.sum(weights * (x - mean) / np.sqrt(var + 1e-5), 0), rtol=1e-6)
    np.testing.assert_allclose(slope["norm"]["bias"], weights.sum(0), rtol=1e-9)


@pytest.mark.slow
def test_inference_is_that_of_the_model(rng):
    plain, model, variables = made(0.5)
    images = rng.normal(size=(4, 5)).astype(np.float32)
    for one in (model, model.inference()):
        outputs, state = one.apply(variables, images, train=False, key=None)
        expected, _ = plain.apply(variables, images, train=False, key=None)
        jax.tree.map(np.testing.assert_array_equal, dict(outputs), dict(expected))
        jax.tree.map(np.testing.assert_array_equal, dict(state), {"batch_stats": variables["batch_stats"]})


def trained(model, variables, batches, **place):
    optimizer = place.pop("optimizer", optax.sgd(0.1))
    objective = jt.classification(model)
    params = {"model": variables["params"]}
    state = jt.init(
        objective, optimizer, KEY, batches[0], params=params, state={"model": {"batch_stats": variables["batch_stats"]}}
    )
    step = jt.train_step(objective, optimizer, **place)
    for batch in batches:
        state, metrics = step(state, batch)
    return jax.tree.map(np.array, (state.params, state.state)), float(metrics["loss"])


@pytest.mark.slow
def test_all_devices_draw_the_same_channels(rng):
    """One device, a mesh of 4 and pmap of 4 end alike."""
    _, model, variables = made(0.5)
    batches = [
        {"image": rng.normal(size=(16, 5)).astype(np.float32), "label": rng.integers(0, 3, 16)} for _ in range(2)
    ]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    places = {}, {"mesh": mesh}, {"mesh": mesh, "mode": "pmap"}
    (one, loss), *others = (trained(model, variables, batches, **place) for place in places)
    for other, other_loss in others:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other, one)


@pytest.mark.slow
def test_frozen_layers_keep_to_inference(rng):
    plain, model, variables = made(0.5)
    batches = [{"image": rng.normal(size=(8, 5)).astype(np.float32), "label": rng.integers(0, 3, 8)} for _ in range(2)]
    frozen = jt.optim.only(optax.sgd(0.1), "model/head")
    (got, loss), (want, expected) = (trained(one, variables, batches, optimizer=frozen) for one in (model, plain))
    assert loss == pytest.approx(expected, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
    jax.tree.map(np.testing.assert_array_equal, got[1]["model"]["batch_stats"], variables["batch_stats"])


@pytest.mark.slow
def test_dropout_draws_as_without(rng):
    """The key of what is inside is a device's own."""
    plain, model, variables = made(0.0, dropout=0.5)
    images = rng.normal(size=(6, 5)).astype(np.float32)
    got, want = (one.apply(variables, images, train=True, key=KEY)[0] for one in (model, plain))
    np.testing.assert_allclose(got["features"], want["features"], rtol=1e-5, atol=1e-6)


def test_a_model_of_the_zoo_and_its_recipe():
    net = jt.models.normalize(jt.models.cifar_resnet(8, 3), 0.5, 0.25)
    model = jt.models.stoch_norm(net)
    assert model.recipe is not None
    assert model.recipe.build == "cifar_resnet"
    assert jt.models.normalize(jt.models.stoch_norm(jt.models.cifar_resnet(8, 3)), 0.5, 0.25).shares_key


def test_refusals():
    _, model, variables = made(0.5)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(jt.InputError, match="in \\[0, 1\\]"):
            jt.models.stoch_norm(model, probability)
    with pytest.raises(jt.InputError, match="pass a key"):
        model.apply(variables, np.zeros((2, 5), np.float32), train=True, key=None)
    bare = jt.models.stoch_norm(jt.models.mlp(3, hidden=()))
    weights = bare.init(KEY, np.zeros((2, 5), np.float32))
    with pytest.raises(jt.InputError, match="found no batch norm"):
        bare.apply(weights, np.zeros((2, 5), np.float32), train=True, key=KEY)
