"""Data without images through `fit` and `evaluate`: numbers, tokens, masks, several labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

N, WORDS = 22, 9


class Network(nn.Module):
    """Two heads on the mean of the word vectors, beside a class for each pixel."""

    @nn.compact
    def __call__(self, tokens):
        there = (tokens > 0)[..., None].astype(jnp.float32)
        mean = jnp.sum(nn.Embed(WORDS, 5)(tokens) * there, 1) / jnp.maximum(jnp.sum(there, 1), 1)
        pixels = nn.Dense(6)(mean).reshape(-1, 2, 1, 3)
        return {"logits": nn.Dense(3)(mean), "pose": nn.Dense(2)(mean), "value": nn.Dense(2)(mean), "pixels": pixels}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    return jt.data.Dataset.from_columns(
        tokens=rng.integers(0, WORDS, (N, 4)),
        label=rng.integers(0, 3, N),
        pose=rng.integers(0, 2, N),
        value=rng.normal(size=(N, 2)),
        ground=rng.integers(0, 3, (N, 2, 1)),
        valid=rng.random((N, 2, 1)) < 0.8,
        class_names={"pose": None, "ground": ("a", "b", "c")},
    )


def pixelwise(model, view):
    """The mean over images of the cross-entropy over the pixels that are valid: a term as a user writes it."""
    forward = jt.Forward.of(model, view)

    def loss(outputs, params, state, batch, ctx):
        scores = jax.nn.log_softmax(outputs[forward]["pixels"])
        chosen = jnp.take_along_axis(scores, batch["ground"][..., None], -1)[..., 0]
        valid = batch["valid"].astype(scores.dtype)
        each = -jnp.sum(chosen * valid, (1, 2)) / jnp.maximum(jnp.sum(valid, (1, 2)), 1)
        value = ctx.mean(each, batch.get("mask"))
        return value.value, state, {"pixelwise": value}

    return jt.Objective("pixelwise", (forward,), loss)


def objective_of(model):
    return (
        jt.classification(model, view="tokens")
        + jt.classification(model, view="tokens", output="pose", label="pose").named("pose")
        + 0.5 * jt.regression(model, view="tokens", output="value", label="value")
        + pixelwise(model, "tokens")
    )


def reference(outputs, data):
    """The metrics over all examples, float64, one example after another."""
    found = {"classification": 0.0, "accuracy": 0.0, "pose": 0.0, "pose/accuracy": 0.0, "regression": 0.0}
    found["pixelwise"] = 0.0
    for i in range(N):
        example = data[i]
        for metric, accuracy, output, label in (
            ("classification", "accuracy", "logits", "label"),
            ("pose", "pose/accuracy", "pose", "pose"),
        ):
            scores = outputs[output][i]
            found[metric] += np.log(np.exp(scores).sum()) - scores[example[label]]
            found[accuracy] += float(np.argmax(scores) == example[label])
        found["regression"] += np.mean((outputs["value"][i] - example["value"]) ** 2)
        pixels, count = 0.0, 0
        for at in np.ndindex(2, 1):
            if example["valid"][at]:
                scores = outputs["pixels"][i][at]
                pixels += np.log(np.exp(scores).sum()) - scores[example["ground"][at]]
                count += 1
        found["pixelwise"] += pixels / max(count, 1)
    return {name: total / N for name, total in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_terms_of_many_columns_train_and_are_evaluated_exactly(data, mode, tmp_path):
    model = jt.models.linen(Network())
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    objective, batches = objective_of(model), jt.data.eval_batches(data, 8)
    arguments = {"mode": mode, "mesh": mesh, "out": tmp_path / "run", "eval_every": 20}
    stream = jt.data.pipeline(data, 8, seed=3)
    fitted = jt.fit(objective, optax.adam(0.05), stream, steps=20, eval_data=batches, **arguments)
    assert fitted.history[-1]["eval/loss"] < 0.8 * fitted.history[0]["train/loss"]
    variables = {"params": fitted.state.params["model"]}
    outputs = jax.device_get(model.apply(variables, data.column("tokens"), train=False, key=None)[0])
    expected = reference({name: np.asarray(values, np.float64) for name, values in outputs.items()}, data)
    found = jt.evaluate(objective, fitted.state, jt.data.eval_batches(data, 8))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name
    changed = data.column("valid").copy()
    changed[0] = ~changed[0]
    columns = {name: data.column(name) for name in data.entries} | {"valid": changed}
    other = jt.data.pipeline(
        jt.data.Dataset.from_columns(columns, class_names={"pose": None, "ground": ("a", "b", "c")}), 8, seed=3
    )
    with pytest.raises(jt.InputError, match=r"a run of another configuration \(arrays; steps"):
        jt.fit(objective, optax.adam(0.05), other, steps=40, eval_data=batches, **arguments)


def test_a_column_of_numbers_is_a_target_of_one_output():
    x, y = np.arange(6.0).reshape(3, 2), np.array([1.0, -2.0, 0.5])
    model = jt.Model(
        lambda key, x: {"params": {"w": jnp.array([[0.5], [-1.0]])}},
        lambda variables, x, *, train, key: ({"logits": x @ variables["params"]["w"]}, {}),
        "model",
    )
    objective = jt.regression(model, view="features", label="label")
    state = jt.TrainState.of({"model": model.init(None, None)["params"]})
    expected = np.mean((x @ [0.5, -1.0] - y) ** 2)
    for label in (y, y[:, None]):
        batches = jt.data.eval_batches(jt.data.Dataset.from_columns(features=x, label=label), 2)
        assert jt.evaluate(objective, state, batches)["regression"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(jt.InputError, match=r"targets must have the shape of the predictions \(3, 1\); got \(3, 2\)"):
        jt.evaluate(objective, state, [{"features": x, "label": x}])


@pytest.mark.slow
def test_a_run_of_data_without_images_is_read_back(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4))
    data = jt.data.Dataset.from_columns(features=features, label=np.where(features[:, 0] > 0, "more", "less"))
    model = jt.models.create("mlp", data.classes)
    assert not hasattr(data, "image_shape")
    objective = jt.classification(model, view="features")
    fitted = jt.fit(objective, optax.adam(1e-2), jt.data.pipeline(data, 10), steps=3, out=tmp_path / "run", model=model)
    run = jt.load_run(tmp_path / "run")
    assert run.class_names == ("less", "more")
    state = jt.TrainState.of(run.params, run.state)
    batches = jt.data.eval_batches(data, 8)
    assert jt.evaluate(objective, state, batches) == jt.evaluate(objective, fitted.state, batches)
