"""NNX modules as models: the numbers of the same Linen module, draws by key, state that is only state."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxtransfer as jt

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
BATCH = {"image": RNG.normal(size=(8, 6, 6, 1)).astype(np.float32), "label": np.arange(8) % 3}
VECTORS = RNG.normal(size=(8, 4)).astype(np.float32)


class Cnn(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return {"features": x, "logits": self.head(x)}


class LinenCnn(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


class Drops(nnx.Module):
    """Two equal dropouts in a row of one bare linear layer, and a table that doesn't train."""

    def __init__(self, rngs):
        self.table = 2 * jnp.ones(())
        self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)])
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return {
            "masks": jnp.stack([drop(jnp.ones((8, 64))) for drop in self.drops]),
            "logits": self.table * self.head(x),
        }


CNN = jt.models.nnx(Cnn, stages=("conv|norm", "head"))
DROPS = jt.models.nnx(Drops)


def close(tolerance):
    return partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=0, atol=tolerance))


def test_a_step_gives_the_numbers_of_the_same_linen_module():
    anchor = jax.tree.map(lambda p: 0.9 * p, CNN.init(KEY, BATCH["image"])["params"])

    variables = CNN.init(KEY, BATCH["image"])
    params, state = {"model": variables["params"]}, {"model": {"batch_stats": variables["batch_stats"]}}

    def after(model):
        objective = jt.classification(model) + 0.1 * jt.l2_sp({"model": anchor}, exclude="head")
        optimizer = optax.sgd(0.1, momentum=0.9)
        current = jt.init(objective, optimizer, KEY, BATCH, params=params, state=state)
        current, metrics = jt.train_step(objective, optimizer)(current, BATCH)
        return current.params, current.state, metrics

    linen, ours = after(jt.models.linen(LinenCnn())), after(CNN)
    assert np.abs(ours[1]["model"]["batch_stats"]["norm"]["var"] - 1).max() > 0.01
    close(1e-6)(ours, linen)


def test_pmap_gives_the_statistics_and_the_update_of_the_global_batch():
    objective, optimizer = jt.classification(CNN), optax.sgd(0.5)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    runs = []
    for where in ({}, {"mesh": mesh}, {"mesh": mesh, "mode": "pmap"}):
        state, _ = jt.train_step(objective, optimizer, **where)(jt.init(objective, optimizer, KEY, BATCH), BATCH)
        runs.append(jax.tree.map(np.asarray, (state.params, state.state)))
    close(1e-6)(runs[1], runs[0])
    close(1e-6)(runs[2], runs[0])


def test_statistics_without_the_field_are_refused_under_an_axis():
    class Renorm(nnx.Module):
        def __init__(self, *, rngs):
            self.mean = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.mean[...] = x.mean()
            return x - self.mean[...]

    class Net(nnx.Module):
        def __init__(self, *, rngs):
            self.body = nnx.List([Renorm(rngs=rngs)])

        def __call__(self, x):
            return self.body[0](x)

    model = jt.models.nnx(Net)
    variables = model.init(KEY, VECTORS)
    with pytest.raises(jt.InputError, match="running state in body/0, a Renorm without a field `axis_name`"):
        model.apply(variables, VECTORS, train=True, key=None, axis="devices")
    model.apply(variables, VECTORS, train=False, key=None, axis="devices")


def test_the_weights_are_those_of_the_module_and_its_key_under_readable_paths():
    variables = CNN.init(KEY, BATCH["image"])
    module = Cnn(rngs=nnx.Rngs(KEY))
    np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], module.conv.kernel[...])
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], module.head.kernel[...])
    assert set(jt.tree.leaves_by_path(variables)) == {
        "params/conv/kernel",
        "params/norm/scale",
        "params/norm/bias",
        "params/head/kernel",
        "params/head/bias",
        "batch_stats/norm/mean",
        "batch_stats/norm/var",
    }
    layers = jt.models.nnx(lambda rngs: nnx.Sequential(*(nnx.Linear(4, 4, rngs=rngs) for _ in range(11))))
    params = layers.init(KEY, VECTORS)["params"]
    assert set(params["layers"]) == {str(number) for number in range(11)}
    expected = VECTORS
    for number in range(11):
        layer = params["layers"][str(number)]
        expected = expected @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    logits = layers.apply({"params": params}, VECTORS, train=False, key=None)[0]["logits"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    shapes = jax.eval_shape(DROPS.init, KEY, VECTORS)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), DROPS.init(KEY, VECTORS)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )


def test_what_goes_by_path_works():
    optimizer = jt.optim.layerwise_decay(optax.sgd(1.0), [f"model/(?:{stage})" for stage in CNN.stages], decay=0.5)
    params = {"model": CNN.init(KEY, BATCH["image"])["params"]}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    rates = {path: float(-update.mean()) for path, update in jt.tree.leaves_by_path(updates).items()}
    assert rates["model/head/kernel"] == 1
    assert rates["model/conv/kernel"] == rates["model/norm/scale"] == 0.5
    fresh = CNN.init(jax.random.key(9), BATCH["image"])["params"]
    merged, report = jt.transfer(params["model"], fresh, reinit=CNN.head)
    assert report.reinitialized == ("head/bias", "head/kernel")
    np.testing.assert_array_equal(merged["conv"]["kernel"], params["model"]["conv"]["kernel"])
    np.testing.assert_array_equal(merged["head"]["kernel"], fresh["head"]["kernel"])


def test_dropout_draws_by_the_key_and_keeps_no_count():
    variables = DROPS.init(KEY, VECTORS)
    assert set(variables) == {"params", "arrays"}
    run = jax.jit(lambda key: DROPS.apply(variables, VECTORS, train=True, key=key))
    (one, state), (same, _), (other, _) = run(KEY), run(KEY), run(jax.random.key(4))
    np.testing.assert_array_equal(one["masks"], same["masks"])
    for masks in (one["masks"], other["masks"]):
        assert set(np.unique(masks)) == {0.0, 2.0}
        assert 0.4 < np.mean(masks[0] == masks[1]) < 0.6  # each layer draws its own
    assert 0.4 < np.mean(one["masks"] == other["masks"]) < 0.6
    assert jax.tree.structure(state) == jax.tree.structure({"arrays": {"table": 0}})
    assert state["arrays"]["table"] == 2
    legacy = DROPS.apply(variables, VECTORS, train=True, key=jax.random.PRNGKey(3))[0]
    np.testing.assert_array_equal(legacy["masks"], one["masks"])
    kept = DROPS.apply(variables, VECTORS, train=False, key=None)[0]
    np.testing.assert_array_equal(kept["masks"], 1)
    head = variables["params"]["head"]
    np.testing.assert_allclose(kept["logits"], 2 * (VECTORS @ head["kernel"] + head["bias"][None]), atol=1e-5)
    with pytest.raises(jt.InputError, match=r"draws .* when training: pass a key"):
        DROPS.apply(variables, VECTORS, train=True, key=None)


def test_arguments_train_and_rngs_and_a_bare_array():
    class Asks(nnx.Module):
        def __init__(self, *, rngs):
            self.drop = nnx.Dropout(0.5)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, *, train, rngs=None):
            return self.drop(x * self.scale, rngs=rngs) + train

    model = jt.models.nnx(Asks, output="features")
    variables = model.init(KEY, VECTORS)
    kept, _ = model.apply(variables, VECTORS, train=False, key=None)
    np.testing.assert_array_equal(kept["features"], VECTORS)
    drawn, _ = model.apply(variables, VECTORS, train=True, key=KEY)
    assert {bool(same) for same in np.unique(np.isclose(drawn["features"], 2 * VECTORS + 1))} == {True, False}
    np.testing.assert_array_equal(np.isclose(drawn["features"], 2 * VECTORS + 1) | (drawn["features"] == 1), True)


def test_a_module_that_is_built_gives_its_weights():
    module = Cnn(rngs=nnx.Rngs(7))
    model = jt.models.nnx(module)
    before = np.array(module.conv.kernel[...])
    module.conv.kernel[...] = jnp.zeros_like(module.conv.kernel[...])  # the model has the weights of when it was made
    variables = model.init(KEY, BATCH["image"])
    np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], before)
    chex.assert_trees_all_equal(variables, model.init(jax.random.key(1), BATCH["image"]))
    _, state = jax.jit(lambda v, x: model.apply(v, x, train=True, key=None))(variables, BATCH["image"])
    assert np.abs(state["batch_stats"]["norm"]["mean"]).max() > 0
    np.testing.assert_array_equal(module.norm.mean[...], 0)  # a call changes a copy


@pytest.mark.slow
def test_it_is_pure_under_transformations():
    """Gradients of two sets of weights at once, with no tracer left behind and nothing large in the program."""
    model = jt.models.nnx(lambda rngs: nnx.Linear(1, 300_000, rngs=rngs))
    x = np.ones((1, 1), np.float32)
    both = jax.vmap(lambda key: model.init(key, x))(jax.random.split(KEY, 2))

    def loss(variables):
        return model.apply(variables, x, train=True, key=KEY)[0]["logits"].mean()

    with jax.checking_leaks():
        gradients = jax.jit(jax.vmap(jax.grad(loss)))(both)
        loss(jax.tree.map(lambda v: v[0], both))
    np.testing.assert_allclose(gradients["params"]["kernel"], 1 / 300_000, rtol=1e-5)
    assert len(jax.jit(loss).lower(jax.tree.map(lambda v: v[0], both)).as_text()) < 100_000


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_as_the_unbroken_one(tmp_path):
    class Net(nnx.Module):
        def __init__(self, *, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(4, 3, rngs=rngs)])

        def __call__(self, x):
            return self.layers[0](self.drop(self.norm(x)))

    objective = jt.classification(jt.models.nnx(Net))

    def batches(end=None):
        for number in range(4):
            if number == end:
                raise RuntimeError("the machine went away")
            yield {"image": VECTORS + number, "label": BATCH["label"]}

    def fit(out, data):
        return jt.fit(objective, optax.adam(0.1), data, steps=4, save_every=2, out=out, progress=False).state

    with pytest.raises(RuntimeError, match="went away"):
        fit(tmp_path / "run", batches(3))
    resumed, whole = fit(tmp_path / "run", batches()), fit(tmp_path / "whole", batches())
    chex.assert_trees_all_equal((resumed.params, resumed.state), (whole.params, whole.state))


@pytest.mark.parametrize(
    ("make", "got"),
    [(lambda rngs: 3, "a function that returns int"), (nn.Dense(3), "Dense"), ("resnet", "str")],
    ids=["number", "linen", "name"],
)
def test_what_is_no_module_is_refused(make, got):
    with pytest.raises(jt.InputError, match=f"expected an nnx.Module, or a function .*got {got}"):
        jt.models.nnx(make)


def test_foreign_variables_and_outputs_are_refused():
    with pytest.raises(jt.InputError, match=r"not those of model 'model'.*- batch_stats/norm/mean \(4,\)"):
        CNN.apply({"params": CNN.init(KEY, BATCH["image"])["params"]}, BATCH["image"], train=False, key=None)

    class Pair(nnx.Linear):
        def __call__(self, x):
            return x, x

    model = jt.models.nnx(partial(Pair, 4, 3))
    with pytest.raises(jt.InputError, match="must return an array or a dict of named arrays; got a tuple"):
        model.apply(model.init(KEY, VECTORS), VECTORS, train=False, key=None)


class Frozen(nnx.Module):
    """A block with batch norm, some without parameters, and dropout; a head."""

    def __init__(self, rngs):
        plain = nnx.BatchNorm(5, use_scale=False, use_bias=False, rngs=rngs)
        drop = nnx.Dropout(0.5, rngs=rngs)
        self.block = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs), plain, drop)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = self.block(x)
        return {"features": x, "logits": self.head(x)}


class PlainNorm(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.plain = nnx.BatchNorm(5, use_scale=False, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(self.plain(self.body(x)))


class OwnNorm(nnx.Module):
    """Moves its mean whatever it is told."""

    def __init__(self):
        self.scale, self.mean = nnx.Param(jnp.ones(4)), nnx.BatchStat(jnp.zeros(4))

    def __call__(self, x):
        self.mean.set_value(0.9 * self.mean.get_value() + 0.1 * x.mean(0))
        return (x - self.mean.get_value()[None]) * self.scale.get_value()[None]


class WithOwnNorm(nnx.Module):
    def __init__(self, rngs):
        self.own, self.head = OwnNorm(), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.own(x))


@pytest.mark.slow
def test_frozen_layers_run_in_inference_mode():
    """Batch norm and dropout of a frozen body: its statistics stay, and the head learns from its features."""
    model, batch = jt.models.nnx(Frozen), {"image": VECTORS, "label": BATCH["label"]}
    objective, optimizer = jt.classification(model), jt.optim.only(optax.sgd(0.5), "head")
    state = jt.init(objective, optimizer, KEY, batch)
    params, before = jax.tree.map(np.array, state.params["model"]), jax.tree.map(np.array, state.state["model"])
    assert len(jax.tree.leaves(before)) == 4
    features = model.apply({"params": params, **before}, VECTORS, train=False, key=None)[0]["features"]
    state, _ = jt.train_step(objective, optimizer)(state, batch)
    chex.assert_trees_all_equal(dict(state.state["model"]), dict(before))
    logits = np.asarray(features) @ params["head"]["kernel"] + params["head"]["bias"][None]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = params["head"]["kernel"] - 0.5 * np.asarray(features).T @ (p - np.eye(3)[BATCH["label"]]) / 8
    np.testing.assert_allclose(state.params["model"]["head"]["kernel"], want, rtol=1e-5, atol=1e-6)
    free = jt.init(objective, optax.sgd(0.5), KEY, batch)
    free, _ = jt.train_step(objective, optax.sgd(0.5))(free, batch)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), dict(free.state["model"]), dict(before))
    assert all(jax.tree.leaves(moved))
    later = jt.optim.gradual_unfreeze(optax.sgd(0.5), ("block", "head"), every=2)
    with pytest.raises(jt.InputError, match="'model' unfreezes layers within one program"):
        jt.init(objective, later, KEY, batch)
    with pytest.raises(
        jt.InputError, match="layer 'own' of model 'model' is frozen, but its running state 'mean' moves"
    ):
        jt.init(jt.classification(jt.models.nnx(WithOwnNorm)), optimizer, KEY, batch)
    with pytest.raises(jt.InputError, match="layer 'plain' of model 'model' has running state but no parameters"):
        jt.init(jt.classification(jt.models.nnx(PlainNorm)), optimizer, KEY, batch)
