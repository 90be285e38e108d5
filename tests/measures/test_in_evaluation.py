"""Measures within an evaluation: those of the whole data set whatever the batches, padding and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtransfer as jt


@pytest.fixture
def traces():
    return []


@pytest.fixture
def model(traces):
    def apply(variables, inputs, *, train, key):
        traces.append(train)
        return {"logits": inputs @ variables["params"]["w"]}, {}

    return jt.Model(lambda key, x: {"params": {"w": jax.random.normal(key, (x.shape[1], 7))}}, apply)


@pytest.fixture
def data(rng):
    return {"image": rng.normal(size=(21, 5)).astype(np.float32), "label": rng.integers(0, 7, 21).astype(np.int32)}


@pytest.fixture
def state(model, data):
    return jt.TrainState.of(*jt.classification(model).init(jax.random.key(1), data))


def padded(data, size, count):
    """Batches of which the last is filled up with what must not count."""
    for start in range(0, count, size):
        stop = min(start + size, count)
        fill = {"image": np.nan, "label": -1, "mask": 0}
        part = {**{name: column[start:stop] for name, column in data.items()}, "mask": np.ones(stop - start)}
        yield {
            name: np.concatenate(
                [column, np.full((size - len(column), *column.shape[1:]), fill.get(name, 0), column.dtype)]
            )
            for name, column in part.items()
        }


def whole(state, data):
    logits = data["image"] @ np.asarray(state.params["model"]["w"])
    return jt.measures.class_scores(logits, data["label"])


@pytest.mark.parametrize(
    ("size", "devices", "mode"), [(8, None, "jit"), (8, 4, "jit"), (8, 4, "pmap")], ids=["one", "mesh", "pmap"]
)
def test_batches_padding_and_devices_change_nothing(model, state, data, traces, size, devices, mode):
    mesh = None if devices is None else jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    traces.clear()
    measure = jt.measures.classification(model)
    run = jt.eval_step(jt.classification(model), mesh=mesh, mode=mode, measures=measure)
    got = [run(state, padded(data, size, 21)) for _ in range(2)][-1]
    assert traces == [False]  # one run, traced once
    scores, want = got.pop("scores"), whole(state, data)
    assert scores.examples == 21
    np.testing.assert_array_equal(scores.confusion, want.confusion)
    np.testing.assert_array_equal(scores.reliability.count, want.reliability.count)
    assert scores.summary() == pytest.approx(want.summary(), rel=1e-5)
    plain = {"accuracy": scores.accuracy, "top5": scores.top[5], "classification": scores.nll, "loss": scores.nll}
    assert got == pytest.approx(plain, rel=1e-5)


def test_several_measures_and_models(model, state, data):
    """A measure may read a model that no term runs, another output's labels, and have its own name."""
    other = jt.frozen(model.named("other"), {"params": {"w": jnp.ones((5, 7))}})
    measures = [jt.measures.classification(model, bins=3), jt.measures.classification(other, name="other", top=())]
    got = jt.evaluate(jt.l2(), state, [data], measures=measures)
    assert set(got) == {"loss", "l2", "scores", "other"}
    assert got["other"].accuracy == np.mean(data["label"] == 0)  # all tie, the first is taken
    assert got["scores"].reliability.bins == 3
    assert got["other"].top == {}


def test_what_is_refused(model, state, data):
    objective, measure = jt.classification(model), jt.measures.classification(model)
    with pytest.raises(jt.InputError, match=r"such as jt\.measures"):
        jt.evaluate(objective, state, [data], measures=["ece"])
    with pytest.raises(jt.InputError, match="two measures are called 'scores'"):
        jt.evaluate(objective, state, [data], measures=[measure, measure])
    with pytest.raises(jt.InputError, match="a measure is called 'accuracy', as a metric is"):
        jt.evaluate(objective, state, [data], measures=jt.measures.classification(model, name="accuracy"))
    with pytest.raises(jt.InputError, match="no example counts"):
        jt.evaluate(objective, state, [{**data, "mask": np.zeros(21)}], measures=measure)
    broken = state._replace(params=jax.tree.map(lambda w: w * np.nan, state.params))
    with pytest.raises(jt.InputError, match="logits of 21 of 21 examples are not finite"):
        jt.evaluate(objective, broken, [data], measures=measure)
