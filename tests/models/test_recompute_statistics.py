"""Batch statistics of other data: their formula, for models of every library."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtransfer as jt

KEY, D, H = jax.random.key(0), 4, 5
RNG = np.random.default_rng(3)
SIZES = (8, 8, 5)  # the last one is padded by three rows that don't count
DATA = [RNG.normal(1 + n, 1 + n, size=(8, D)).astype(np.float32) for n in range(3)]
BATCHES = [{"image": x, "mask": (np.arange(8) < n).astype(np.float32)} for x, n in zip(DATA, SIZES, strict=True)]


class Linen(nn.Module):
    axis: str | None = None
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        for number in (1, 2):
            x = nn.Dense(H, name=f"dense{number}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.999, name=f"norm{number}")(x)
            x = nn.relu(x)
        return {"features": x, "logits": nn.Dropout(0.0, deterministic=not train)(x)}


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.dense1, self.dense2 = nnx.Linear(D, H, rngs=rngs), nnx.Linear(H, H, rngs=rngs)
        self.norm1, self.norm2 = (nnx.BatchNorm(H, momentum=0.9, rngs=rngs) for _ in range(2))
        self.table = jnp.ones(H)  # state that no batch moves, though statistics depend on it

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.dense1(x) * self.table[None]))
        return nnx.relu(self.norm2(self.dense2(x)))


class Equinox(eqx.Module):
    dense1: eqx.nn.Linear
    dense2: eqx.nn.Linear
    norm1: eqx.nn.BatchNorm
    norm2: eqx.nn.BatchNorm

    def __init__(self, key, mode):
        keys = jax.random.split(key)
        self.dense1, self.dense2 = eqx.nn.Linear(D, H, key=keys[0]), eqx.nn.Linear(H, H, key=keys[1])
        self.norm1, self.norm2 = (eqx.nn.BatchNorm(H, "batch", momentum=0.99, mode=mode) for _ in range(2))

    def __call__(self, x, state):
        x, state = self.norm1(self.dense1(x), state)
        x, state = self.norm2(self.dense2(jax.nn.relu(x)), state)
        return jax.nn.relu(x), state


def of_equinox(mode):
    return jt.models.equinox(lambda key: eqx.nn.make_with_state(Equinox)(key, mode))


def dense(params, number, x):
    """A layer of any of the libraries, in double precision."""
    own = params[f"dense{number}"]
    kernel = np.float64(own["kernel"]) if "kernel" in own else np.float64(own["weight"]).T
    return x @ kernel + np.float64(own["bias"])


def expected(params, batches, epsilon):
    """(mean, var) of both layers: sums over the batches, each normalised by its own statistics."""
    sums, count = [np.zeros((2, H)), np.zeros((2, H))], sum(map(len, batches))
    for x in map(np.float64, batches):
        for number in (1, 2):
            z = dense(params, number, x)
            sums[number - 1] += [z.sum(0), (z**2).sum(0)]
            x = np.maximum((z - z.mean(0)) / np.sqrt(z.var(0) + epsilon), 0)
    return [(total / count, square / count - (total / count) ** 2) for total, square in sums]


MODELS = {
    "linen": (jt.models.linen(Linen()), 1e-5),
    "nnx": (jt.models.nnx(Nnx), 1e-5),
    "equinox": (of_equinox("batch"), 1e-5),
    "equinox, as the running ones": (of_equinox("ema"), 1e-5),
}


def found(variables):
    """(mean, var) of both layers, by whatever names."""
    if "batch_stats" not in variables and "BatchStat" not in variables:
        own = [variables["state"][f"norm{n}"] for n in (1, 2)]
        pairs = [one.get("batch_state_index") or one.get("ema_state_index") for one in own]
        return [(pair["0"], pair["1"]) for pair in pairs]
    kind = variables.get("batch_stats") or variables["BatchStat"]
    return [(kind[f"norm{n}"]["mean"], kind[f"norm{n}"]["var"]) for n in (1, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_all_examples_that_count(name):
    model, epsilon = MODELS[name]
    variables = model.init(KEY, DATA[0])
    renewed = jt.recompute_statistics(model, variables, BATCHES)
    rows = [x[:n] for x, n in zip(DATA, SIZES, strict=True)]
    for got, right in zip(found(renewed), expected(variables["params"], rows, epsilon), strict=True):
        np.testing.assert_allclose(got, right, rtol=2e-5, atol=2e-5)
    whole = dense(variables["params"], 1, np.float64(np.concatenate(rows)))
    np.testing.assert_allclose(found(renewed)[0], (whole.mean(0), whole.var(0)), rtol=2e-5, atol=2e-5)
    assert jax.tree.structure(renewed) == jax.tree.structure(dict(variables))
    assert jax.tree.map(jnp.shape, renewed) == jax.tree.map(jnp.shape, dict(variables))
    outputs, _ = model.apply(renewed, DATA[0], train=False, key=None)
    z = np.float64(DATA[0])
    for number, (mean, var) in enumerate(expected(variables["params"], rows, epsilon), 1):
        z = np.maximum((dense(variables["params"], number, z) - mean) / np.sqrt(var + epsilon), 0)
    np.testing.assert_allclose(outputs["logits"], z, rtol=1e-4, atol=1e-4)  # what inference makes of them


@pytest.mark.slow
def test_our_batch_norm_by_one_batch_of_all_is_that_of_the_data():
    model = jt.models.with_heads(jt.models.mlp(3, hidden=(H,)), projection=jt.models.head(H, 3))
    x = np.concatenate(DATA)
    variables = model.init(KEY, x)
    renewed = jt.recompute_statistics(model, variables, [{"image": x}])
    trained, _ = model.apply(variables, x, train=True, key=KEY)
    inference, _ = model.apply(renewed, x, train=False, key=None)
    np.testing.assert_allclose(inference["projection"], trained["projection"], rtol=1e-4, atol=1e-5)


def test_layers_in_inference_mode_and_what_is_no_average_keep_theirs():
    model = jt.models.linen(Linen()).inference("dense1|norm1")
    variables = model.init(KEY, DATA[0])
    renewed = jt.recompute_statistics(model, variables, BATCHES)
    np.testing.assert_array_equal(*(found(v)[0] for v in (renewed, variables)))
    assert np.abs(found(renewed)[1][0]).max() > 0.1

    def counted(variables, x, *, train, key):
        count, mean = variables["stats"]["count"], variables["stats"]["mean"]
        moved = {"count": count + 1, "mean": 0.5 * mean + 0.5 * x.mean(0)}
        return {"features": x}, {"stats": moved if train else variables["stats"]}

    stats = {"count": jnp.float32(7), "mean": jnp.full(D, 1e6)}  # far from the data's: nothing is lost to rounding
    model = jt.Model(lambda key, x: {"params": {}, "stats": stats}, counted)
    renewed = jt.recompute_statistics(model, {"params": {}, "stats": stats}, [{"x": DATA[0]}, {"x": DATA[1]}], view="x")
    assert float(renewed["stats"]["count"]) == 7
    np.testing.assert_allclose(renewed["stats"]["mean"], np.mean(DATA[:2], axis=(0, 1)), rtol=1e-6)


def with_update(update):
    def apply(variables, x, *, train, key):
        return {"features": x}, {"stats": {"mean": update(variables["stats"]["mean"], x)}}

    return jt.Model(lambda key, x: {"params": {}, "stats": {"mean": jnp.ones(D)}}, apply)


def test_misuse_is_told():
    mlp = jt.models.mlp(3)
    with pytest.raises(jt.InputError, match="has no running state"):
        jt.recompute_statistics(mlp, mlp.init(KEY, DATA[0]), BATCHES)
    model = MODELS["linen"][0]
    variables = model.init(KEY, DATA[0])
    with pytest.raises(jt.InputError, match="no statistic of model 'model' moves"):
        jt.recompute_statistics(model.inference(), variables, BATCHES)
    with pytest.raises(jt.InputError, match="one after the other, got a dict"):
        jt.recompute_statistics(model, variables, BATCHES[0])
    with pytest.raises(jt.InputError, match="at least one example"):
        jt.recompute_statistics(model, variables, [{"image": DATA[0], "mask": np.zeros(8)}])
    with pytest.raises(jt.InputError, match=r"reads batch\['pixels'\], but the batch has \['image', 'mask'\]"):
        jt.recompute_statistics(model, variables, BATCHES, view="pixels")
    zeros_first = [{"image": np.zeros((8, D), np.float32)}, *BATCHES]
    with pytest.raises(jt.InputError, match="'batch_stats/norm1/mean' didn't move in the first batch"):
        jt.recompute_statistics(model, variables, zeros_first)
    own = {"params": {}, "stats": {"mean": jnp.ones(D)}}
    with pytest.raises(jt.InputError, match="'stats/mean' is no moving average"):
        jt.recompute_statistics(with_update(lambda old, x: old * x.mean(0)), own, BATCHES)
    renormalised = with_update(lambda old, x: 0.5 * old + 0.5 * (x * jnp.clip(old, -2, 2)[None]).mean(0))
    with pytest.raises(jt.InputError, match="'stats/mean' takes from a batch depends on the running ones"):
        jt.recompute_statistics(renormalised, own, BATCHES)
