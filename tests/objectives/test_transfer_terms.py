"""BSS, DELTA and Co-Tuning on models: against NumPy in double precision, and what they refuse at init."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)


def batch_of(rng, rows=6, classes=3, masked=False):
    image = rng.normal(size=(rows, 4, 4, 1)).astype(np.float32)
    batch = {"image": image, "label": rng.integers(0, classes, rows).astype(np.int32)}
    if masked:
        batch["mask"] = (np.arange(rows) % 3 != 1).astype(np.float32)
        batch["image"][batch["mask"] == 0] = 50
    return batch


def term_of(objective, params, state, batch):
    """Value, gradient and metrics of an objective, compiled."""
    frozen = {handle: handle.tree for handle in objective.frozen}

    @jax.jit
    def run(params, state, batch, trees):
        ctx = jt.Context(jnp.int32(0), KEY, dict(zip(frozen, trees, strict=True)))

        def loss(params):
            value, _, metrics = objective(params, state, batch, ctx)
            return value, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, metrics), slope = run(params, state, batch, list(frozen.values()))
    return float(value), metrics, slope


def perceptron(batch, name="model", classes=3):
    model = jt.models.mlp(classes, hidden=(5,), name=name)
    return model, model.init(jax.random.key(len(name)), batch["image"])


def hidden(variables, images):
    """The features of the perceptron, in double precision."""
    dense = {k: np.asarray(v, np.float64) for k, v in variables["params"]["stage1"].items()}
    return np.maximum(images.reshape(len(images), -1) @ dense["kernel"] + dense["bias"], 0)


@pytest.mark.parametrize("masked", [False, True])
def test_bss(rng, masked):
    batch = batch_of(rng, masked=masked)
    model, variables = perceptron(batch)
    objective = jt.bss(model, k=2, strength=0.3)
    value, metrics, slope = term_of(objective, {"model": variables["params"]}, {"model": {}}, batch)
    features = hidden(variables, batch["image"][batch.get("mask", np.ones(6)) > 0])
    expected = 0.3 * np.sum(np.linalg.svd(features, compute_uv=False)[-2:] ** 2)
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert float(metrics["bss"].value) == pytest.approx(value, rel=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    assert not np.any(slope["model"]["head"]["kernel"])


@pytest.mark.parametrize("masked", [False, True])
def test_delta(rng, masked):
    batch = batch_of(rng, masked=masked)
    model, variables = perceptron(batch)
    source, before = perceptron(batch, "source", classes=7)
    weights = np.float32([0.1, 0.2, 0.3, 0.4, 0])
    rows = batch["image"][batch.get("mask", np.ones(6)) > 0]
    squares = (hidden(variables, rows) - hidden(before, rows)) ** 2
    for given, expected in (({}, squares.sum(1)), ({"features": weights}, 5 * squares @ weights)):
        taps = "features" if given else ("features", "stage1")  # the same map twice
        objective = jt.delta(model, jt.frozen(source, before), taps=taps, strength=0.2, weights=given)
        value, metrics, slope = term_of(objective, {"model": variables["params"]}, {"model": {}}, batch)
        assert value == pytest.approx((1 if given else 2) * 0.2 * 0.5 * expected.mean(), rel=1e-5)
        assert float(metrics["delta"].value) == pytest.approx(value, rel=1e-6)
        assert set(slope) == {"model"}
        assert np.any(slope["model"]["stage1"]["kernel"])
        assert np.all(np.isfinite(slope["model"]["stage1"]["kernel"]))


def test_delta_is_zero_at_the_source(rng):
    batch = batch_of(rng)
    model, variables = perceptron(batch)
    objective = jt.delta(model, jt.frozen(model.named("source"), variables), taps="features")
    value, _, slope = term_of(objective, {"model": variables["params"]}, {"model": {}}, batch)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("masked", [False, True])
def test_co_tuning(rng, masked):
    """The pretrained head stands beside a new one; both learn."""
    batch = batch_of(rng, masked=masked)
    net, _ = perceptron(batch)
    both = jt.models.with_heads(net, source=jt.models.head(4, batch_norm=False))
    variables = both.init(KEY, np.zeros((1, 4, 4, 1), np.float32))
    relationship = rng.dirichlet(np.ones(4), 3).astype(np.float32)
    objective = jt.co_tuning(both, relationship, strength=0.7)
    params = {"model": variables["params"]}
    value, metrics, slope = term_of(objective, params, {"model": {}}, batch)
    kept = batch.get("mask", np.ones(6)) > 0
    features = hidden({"params": variables["params"]["encoder"]}, batch["image"][kept])
    head = {k: np.asarray(v, np.float64) for k, v in variables["params"]["source"]["dense1"].items()}
    logits, expected = features @ head["kernel"] + head["bias"], []
    for row, label in zip(logits, batch["label"][kept], strict=True):
        chances = np.exp(row) / np.exp(row).sum()
        expected.append(np.sum(relationship[label] * np.log(relationship[label] / chances)))
    assert value == pytest.approx(0.7 * np.mean(expected), rel=1e-5)
    assert float(metrics["co_tuning"].value) == pytest.approx(value, rel=1e-6)
    assert np.any(slope["model"]["source"]["dense1"]["kernel"])
    assert np.any(slope["model"]["encoder"]["stage1"]["kernel"])
    assert not np.any(slope["model"]["encoder"]["head"]["kernel"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


def test_filter_weights(rng):
    """Against forward passes in NumPy with one filter's kernel at zero."""
    batch = batch_of(rng, rows=8)
    model, variables = perceptron(batch)
    batches = [batch, {**batch, "mask": np.float32(np.arange(8) < 3), "image": batch["image"][::-1].copy()}]
    found = jt.filter_weights(model, variables, batches, filters={"stage1": "stage1/kernel"}, temperature=0.5)
    params = jax.tree.map(lambda x: np.array(x, np.float64), dict(variables["params"]))

    def loss():
        values = []
        for one in batches:
            features = hidden({"params": params}, one["image"])
            logits = features @ params["head"]["kernel"] + params["head"]["bias"]
            for row, label, counted in zip(logits, one["label"], one.get("mask", np.ones(8)), strict=True):
                values += [np.log(np.exp(row).sum()) - row[label]] if counted else []
        return np.mean(values)

    base, increases = loss(), []
    for channel in range(5):
        kernel = params["stage1"]["kernel"]
        params["stage1"]["kernel"] = np.where(np.arange(5) == channel, 0, kernel)
        increases.append((loss() - base) / 0.5)
        params["stage1"]["kernel"] = kernel
    expected = np.exp(increases) / np.exp(increases).sum()
    np.testing.assert_allclose(found["stage1"], expected, rtol=1e-4)
    rows = jt.filter_weights(model, variables, batches, filters={"stage1": "stage1/kernel"}, axis=0)
    assert rows["stage1"].shape == (16,)
    with pytest.raises(jt.InputError, match="kernels are"):
        jt.filter_weights(model, variables, batches, filters={"stage1": "stage9/kernel"})
    with pytest.raises(jt.InputError, match="needs a batch"):
        jt.filter_weights(model, variables, [], filters={"stage1": "stage1/kernel"})


def test_refusals(rng):
    batch = batch_of(rng)
    model, variables = perceptron(batch)
    frozen = jt.frozen(model.named("source"), variables)
    uniform = np.full((3, 4), 0.25)
    cases = [
        (lambda: jt.bss(model, k=0), "k must be at least 1"),
        (lambda: jt.bss(model, strength=-1), "strength"),
        (lambda: jt.delta(model, frozen, taps=()), "one output or more"),
        (lambda: jt.delta(model, model, taps="features"), "jt.frozen"),  # pyright: ignore[reportArgumentType]
        (lambda: jt.delta(model, frozen, taps="features", weights={"stage2": [1]}), "got one of 'stage2'"),
        (lambda: jt.delta(model, frozen, taps="features", weights={"features": [-1, 2]}), "not negative"),
        (lambda: jt.delta(model, frozen, taps="features", strength=float("nan")), "strength"),
        (lambda: jt.co_tuning(model, uniform * 2), "sum to 1"),
        (lambda: jt.co_tuning(model, [0.5, 0.5]), "rows of probabilities"),
    ]
    for make, message in cases:
        with pytest.raises(jt.InputError, match=message):
            make()
    optimizer = optax.sgd(0.1)
    other, narrow = perceptron(batch, "other", classes=5)
    at_init = [
        (jt.bss(model, k=6), r"k=6\); 'features'"),
        (jt.delta(model, frozen, taps="stage7"), "stage7"),
        (jt.delta(model, jt.frozen(other, narrow), taps="logits"), "maps of one shape"),
        (jt.delta(model, frozen, taps="features", weights={"features": [1.0]}), r"must be \[5\]"),
        (jt.co_tuning(model, uniform, output="logits"), "4 classes of the source"),
        (jt.co_tuning(model, uniform[:2, :3] / 0.75, output="logits"), r"labels must be in \[0, 2\)"),
    ]
    batch["label"][0] = 2
    for objective, message in at_init:
        with pytest.raises(jt.InputError, match=message):
            jt.init(objective, optimizer, KEY, batch)
