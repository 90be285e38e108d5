"""Weights that come without the batch statistics they were trained with are refused, and the message names them."""

import jax
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).normal(size=(8, 4, 4, 1)).astype(np.float32)
    return {"image": images, "label": (np.arange(8) % 3).astype(np.int32)}


@pytest.fixture(scope="module")
def model():
    return jt.models.small_cnn(3, width=2)


@pytest.fixture(scope="module")
def variables(model, batch):
    return dict(model.init(KEY, batch["image"]))


WITHOUT = r"params of 'model' come without its batch_stats: pass state=\{'model': \.\.\.\}"


@pytest.mark.parametrize("state", [None, {}])
def test_weights_alone_are_refused(model, variables, batch, state, tmp_path):
    params, objective = {"model": variables["params"]}, jt.classification(model)
    for trained in (objective, jt.classification(model.inference()), objective + jt.l2_sp(params)):
        with pytest.raises(jt.InputError, match=WITHOUT):
            jt.init(trained, optax.sgd(0.1), KEY, batch, params=params, state=state)
    with pytest.raises(jt.InputError, match=WITHOUT):
        jt.fit(objective, optax.sgd(0.1), [batch], steps=1, params=params, state=state)
    with pytest.raises(jt.InputError, match=r"state\['model'\] does not fit the model .* batch_stats/stage1_norm/mean"):
        jt.init(objective, optax.sgd(0.1), KEY, batch, params=params, state={"model": {}})


def test_with_their_statistics_or_fresh_ones_they_are_taken(model, variables, batch):
    params, objective = {"model": variables["params"]}, jt.classification(model)
    fresh = {"model": {"batch_stats": jax.tree.map(lambda x: x + 1, variables["batch_stats"])}}
    state = jt.init(objective, optax.sgd(0.1), KEY, batch, params=params, state=fresh)
    np.testing.assert_array_equal(state.state["model"]["batch_stats"]["stem_norm"]["mean"], np.ones(2, np.float32))
    plain = jt.models.mlp(3)  # has none
    weights = {"model": plain.init(KEY, batch["image"])["params"]}
    jt.init(jt.classification(plain), optax.sgd(0.1), KEY, batch, params=weights)


def test_of_several_models_the_one_that_lacks_them_is_named(model, variables, batch):
    other = model.named("other")
    both = jt.classification(model) + jt.classification(other).named("second")
    params = {"model": variables["params"], "other": variables["params"]}
    state = {"model": {"batch_stats": variables["batch_stats"]}}
    with pytest.raises(jt.InputError, match="params of 'other' come without its batch_stats"):
        jt.init(both, optax.sgd(0.1), KEY, batch, params=params, state=state)
    del params["other"]  # starts afresh, weights and statistics
    jt.init(both, optax.sgd(0.1), KEY, batch, params=params, state=state)


@pytest.mark.slow
def test_wherever_weights_are_taken(model, variables, batch):
    alone = {"params": variables["params"]}
    student = jt.models.mlp(3, name="student")
    missing = r"the variables are not those of model 'model': .*batch_stats"
    with pytest.raises(jt.InputError, match=missing):
        jt.init(jt.distillation(student, jt.frozen(model, alone)), optax.sgd(0.1), KEY, batch)
    with pytest.raises(jt.InputError, match=missing):
        jt.evaluate(jt.classification(model), jt.TrainState.of({"model": variables["params"]}), [batch])
    with pytest.raises(jt.InputError, match=missing):
        jt.fisher_diagonal(jt.classification(model), {"model": variables["params"]}, {}, [batch])
    some = {**alone, "batch_stats": {"stem_norm": variables["batch_stats"]["stem_norm"]}}
    lacks = "not those of model 'model': its state lacks batch_stats/stage1_norm/mean, batch_stats/stage1_norm/var, "
    with pytest.raises(jt.InputError, match=lacks):
        model.apply(some, batch["image"], train=True, key=None)
