"""Heads on an encoder: one model, its outputs, its encoder back."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.models import heads

X = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)


def joint():
    encoder = jt.models.small_cnn(3, width=4)
    return encoder, heads.with_heads(
        encoder, projection=heads.head(10, 5), prediction=("projection", heads.head(7, 5, batch_norm=False))
    )


@pytest.mark.slow
def test_outputs_are_the_heads_on_the_encoder():
    encoder, model = joint()
    variables = model.init(jax.random.key(0), X)
    outputs, state = model.apply(variables, X, train=True, key=None)
    inside = heads.encoder_of(variables)
    features, inside_state = encoder.apply(inside, X, train=True, key=None)
    np.testing.assert_array_equal(outputs["features"], features["features"])
    assert jax.tree.all(jax.tree.map(np.array_equal, heads.encoder_of(state), inside_state))
    p = jax.tree.map(np.float64, variables["params"])
    x = np.float64(features["features"]) @ p["projection"]["dense1"]["kernel"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    z = np.maximum(x, 0) @ p["projection"]["dense2"]["kernel"] + p["projection"]["dense2"]["bias"]
    np.testing.assert_allclose(outputs["projection"], z, rtol=1e-4, atol=1e-5)
    y = np.maximum(z @ p["prediction"]["dense1"]["kernel"] + p["prediction"]["dense1"]["bias"], 0)
    y = y @ p["prediction"]["dense2"]["kernel"] + p["prediction"]["dense2"]["bias"]
    np.testing.assert_allclose(outputs["prediction"], y, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure({k: v for k, v in variables.items() if k != "params"})


def test_stages_cover_the_parameters():
    _, model = joint()
    variables = model.init(jax.random.key(0), X)
    optimizer = jt.optim.layerwise_decay(optax.sgd(0.1), [f"model/(?:{s})" for s in model.stages], decay=0.5)
    optimizer.init({"model": variables["params"]})


def test_refusals():
    encoder = jt.models.mlp(3, hidden=(4,))
    for sizes in ((), (0,), (4, -1)):
        with pytest.raises(jt.InputError, match="at least 1 each"):
            heads.head(*sizes)
    with pytest.raises(jt.InputError, match="can't be called 'encoder'"):
        heads.with_heads(encoder, encoder=heads.head(3))
    with pytest.raises(jt.InputError, match="unknown output of 'model' 'nope'"):
        heads.with_heads(encoder, z=("nope", heads.head(3))).init(jax.random.key(0), X)
