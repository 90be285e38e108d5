"""Equinox modules as models: the numbers of a network written out, batch norm over the whole batch, draws by key."""

import importlib
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

eqx: Any = pytest.importorskip("equinox")

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
BATCH = {"image": RNG.normal(1.0, 2.0, size=(8, 4)).astype(np.float32), "label": np.arange(8) % 3}
MOMENTUM = 0.8


class Net(eqx.Module):
    layers: list
    norm: Any
    drop: Any
    head: Any
    table: jax.Array

    def __init__(self, rate=0.0, *, key):
        first, last = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 5, key=first), jax.nn.relu]
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", momentum=MOMENTUM, mode="batch")
        self.drop = eqx.nn.Dropout(rate)
        self.head = eqx.nn.Linear(5, 3, key=last)
        self.table = jnp.arange(3)

    def __call__(self, x, state, *, key=None):
        for layer in self.layers:
            x = layer(x)
        x, state = self.norm(x, state)
        return {"features": x, "logits": self.head(self.drop(x, key=key))}, state


def made(rate=0.0):
    return lambda key: eqx.nn.make_with_state(Net)(rate, key=key)


NET = jt.models.equinox(made(), stages=("layers|norm", "head"))
DROPS = jt.models.equinox(made(0.5))


def close(tolerance):
    return partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=0, atol=tolerance))


def stepped(model, **where):
    objective, optimizer = jt.classification(model), optax.sgd(0.5)
    variables = NET.init(KEY, BATCH["image"])
    params, state = {"model": variables.pop("params")}, {"model": variables}
    state = jt.init(objective, optimizer, KEY, BATCH, params=params, state=state)
    state, metrics = jt.train_step(objective, optimizer, **where)(state, BATCH)
    return jax.tree.map(np.asarray, (state.params["model"], state.state["model"], metrics["loss"]))


def test_a_step_gives_the_numbers_of_the_network_written_out():
    first = NET.init(KEY, BATCH["image"])

    def loss(params):
        linear, norm, head = params["layers"]["0"], params["norm"], params["head"]
        x = jnp.maximum(BATCH["image"] @ linear["weight"].T + linear["bias"][None], 0)
        mean, var = x.mean(0), ((x - x.mean(0, keepdims=True)) ** 2).mean(0)
        x = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None] * norm["weight"][None] + norm["bias"][None]
        logits = x @ head["weight"].T + head["bias"][None]
        own = jnp.take_along_axis(logits, BATCH["label"][:, None], 1)[:, 0]
        return (jax.nn.logsumexp(logits, 1) - own).mean(), (mean, var)

    (value, (mean, var)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(first["params"])
    params, state, ours = stepped(NET)
    close(1e-6)(params, jax.tree.map(lambda p, g: p - 0.5 * g, first["params"], gradients))
    np.testing.assert_allclose(ours, value, atol=1e-6)
    statistics = state["state"]["norm"]["batch_state_index"]
    np.testing.assert_allclose(statistics["0"], (1 - MOMENTUM) * mean, atol=1e-6)
    np.testing.assert_allclose(statistics["1"], MOMENTUM + (1 - MOMENTUM) * var, atol=1e-6)
    assert state["state"]["norm"]["batch_counter"] == 1


def test_pmap_gives_the_statistics_and_the_update_of_the_global_batch():
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    one = stepped(NET)
    close(1e-6)(stepped(NET, mesh=mesh), one)
    close(1e-6)(stepped(NET, mesh=mesh, mode="pmap"), one)


def test_paths_are_those_of_the_fields_and_weights_those_of_the_key():
    variables = NET.init(KEY, BATCH["image"])
    assert set(jt.tree.leaves_by_path(variables)) == {
        "params/layers/0/weight",
        "params/layers/0/bias",
        "params/norm/weight",
        "params/norm/bias",
        "params/head/weight",
        "params/head/bias",
        "state/norm/batch_counter",
        "state/norm/batch_state_index/0",
        "state/norm/batch_state_index/1",
        "arrays/table",
    }
    module, _ = made()(KEY)
    np.testing.assert_array_equal(variables["params"]["head"]["weight"], module.head.weight)
    shapes = jax.eval_shape(NET.init, KEY, BATCH["image"])
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    optimizer = jt.optim.only(optax.sgd(1.0), NET.head)
    updates, _ = optimizer.update(variables["params"], optimizer.init(variables["params"]), variables["params"])
    moved = {path for path, update in jt.tree.leaves_by_path(updates).items() if np.abs(update).max() > 0}
    assert moved == {"head/weight", "head/bias"}


def test_dropout_draws_by_the_key_for_each_example():
    variables = DROPS.init(KEY, np.ones((8, 4), np.float32))
    same_rows = np.ones((64, 4), np.float32)
    variables["params"]["norm"]["bias"] = jnp.ones(5)
    run = jax.jit(lambda key: DROPS.apply(variables, same_rows, train=True, key=key))
    (one, state), (same, _), (other, _) = run(KEY), run(KEY), run(jax.random.key(4))
    np.testing.assert_array_equal(one["logits"], same["logits"])
    assert len(np.unique(np.asarray(one["logits"]), axis=0)) > 8
    assert (one["logits"] != other["logits"]).any()
    assert jax.tree.structure(state) == jax.tree.structure({k: v for k, v in variables.items() if k != "params"})
    kept, unchanged = DROPS.apply(variables, same_rows, train=False, key=None)
    head = variables["params"]["head"]
    expected = np.asarray(kept["features"]) @ np.asarray(head["weight"]).T + np.asarray(head["bias"])
    np.testing.assert_allclose(kept["logits"], expected, atol=1e-5)
    chex.assert_trees_all_equal(unchanged, {k: v for k, v in variables.items() if k != "params"})


def test_modules_that_are_built_give_their_weights():
    mlp = eqx.nn.MLP(4, 3, 8, 1, key=KEY)
    model = jt.models.equinox(mlp, output="features")
    variables = model.init(jax.random.key(1), BATCH["image"])
    assert set(variables) == {"params"}
    outputs, state = model.apply(variables, BATCH["image"], train=True, key=KEY)
    np.testing.assert_allclose(outputs["features"], [mlp(x) for x in jnp.asarray(BATCH["image"])], atol=1e-6)
    assert state == {}
    pair = jt.models.equinox(made()(KEY))
    chex.assert_trees_all_equal(pair.init(jax.random.key(1), None), NET.init(KEY, None))


def test_it_is_pure_under_transformations():
    """Gradients of two sets of weights at once, with no tracer left behind and nothing large in the program."""
    model = jt.models.equinox(lambda key: eqx.nn.Linear(1, 300_000, key=key))
    x = np.ones((1, 1), np.float32)
    both = jax.vmap(lambda key: model.init(key, x))(jax.random.split(KEY, 2))

    def loss(variables):
        return model.apply(variables, x, train=True, key=KEY)[0]["logits"].mean()

    with jax.checking_leaks():
        gradients = jax.jit(jax.vmap(jax.grad(loss)))(both)
    np.testing.assert_allclose(gradients["params"]["weight"], 1 / 300_000, rtol=1e-5)
    assert len(jax.jit(loss).lower(jax.tree.map(lambda v: v[0], both)).as_text()) < 100_000


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_the_unbroken_one(tmp_path):
    objective = jt.classification(DROPS)

    def batches(end=None):
        for number in range(4):
            if number == end:
                raise RuntimeError("the machine went away")
            yield BATCH | {"image": BATCH["image"] + number}

    def fit(out, data):
        return jt.fit(objective, optax.adam(0.1), data, steps=4, save_every=2, out=out, progress=False).state

    with pytest.raises(RuntimeError, match="went away"):
        fit(tmp_path / "run", batches(3))
    resumed, whole = fit(tmp_path / "run", batches()), fit(tmp_path / "whole", batches())
    chex.assert_trees_all_equal((resumed.params, resumed.state), (whole.params, whole.state))


def test_state_elsewhere_than_in_batch_norm_is_refused_under_an_axis():
    class Counts(eqx.Module):
        index: Any

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.zeros(()))

        def __call__(self, x, state):
            return x, state.set(self.index, state.get(self.index) + 1)

    model = jt.models.equinox(lambda key: eqx.nn.make_with_state(Counts)())
    variables = model.init(KEY, BATCH["image"])
    _, state = model.apply(variables, BATCH["image"], train=True, key=None)
    assert state["state"]["index"] == 1
    with pytest.raises(jt.InputError, match="running state at index, outside of batch norm"):
        model.apply(variables, BATCH["image"], train=True, key=None, axis="devices")


def test_what_cannot_be_a_model_is_refused(monkeypatch):
    with pytest.raises(jt.InputError, match=r"expected an eqx.Module, .*got int"):
        jt.models.equinox(lambda key: 3)
    with pytest.raises(jt.InputError, match=r"expected an eqx.Module, .*got str"):
        jt.models.equinox("resnet")
    with pytest.raises(jt.InputError, match="make_with_state"):
        jt.models.equinox(lambda key: Net(key=key))

    class Rows(eqx.Module):
        norm: Any

    with pytest.raises(jt.InputError, match=r"norm averages over axis_name='rows', .*called 'batch'"):
        jt.models.equinox(lambda key: eqx.nn.make_with_state(Rows)(eqx.nn.BatchNorm(4, "rows", mode="batch")))
    with pytest.raises(jt.InputError, match=r"not those of model 'model'.*- params/head/bias \(3,\)"):
        NET.apply({"params": {}}, BATCH["image"], train=False, key=None)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(jt.InputError, match=r"pip install 'jaxtransfer\[equinox\]'"):
        jt.models.equinox(made())


def test_frozen_layers_run_in_inference_mode():
    """Batch norm and dropout of a frozen body: its statistics stay, and the head learns from its features."""
    objective, optimizer = jt.classification(DROPS), jt.optim.only(optax.sgd(0.5), "head")
    state = jt.init(objective, optimizer, KEY, BATCH)
    params, before = jax.tree.map(np.array, state.params["model"]), jax.tree.map(np.array, state.state["model"])
    features = DROPS.apply({"params": params, **before}, BATCH["image"], train=False, key=None)[0]["features"]
    state, _ = jt.train_step(objective, optimizer)(state, BATCH)
    chex.assert_trees_all_equal(dict(state.state["model"]), dict(before))
    logits = np.asarray(features) @ params["head"]["weight"].T + params["head"]["bias"][None]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = params["head"]["weight"] - 0.5 * (p - np.eye(3)[BATCH["label"]]).T @ np.asarray(features) / 8
    np.testing.assert_allclose(state.params["model"]["head"]["weight"], want, rtol=1e-5, atol=1e-6)
    later = jt.optim.gradual_unfreeze(optax.sgd(0.5), ("layers|norm", "head"), every=2)
    with pytest.raises(jt.InputError, match="'model' unfreezes layers within one program"):
        jt.init(objective, later, KEY, BATCH)
