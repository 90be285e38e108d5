"""Multi-label classification as an objective: its metrics, masks and weights, and average precision over all data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics as sk

import jaxtransfer as jt


def reference(logits, targets, pos_weight, smoothing):
    p, q = 1 / (1 + np.exp(-logits.astype(np.float64))), (1 - smoothing) * targets + smoothing / 2
    return -np.mean(pos_weight * q * np.log(p) + (1 - q) * np.log(1 - p), axis=1)


@pytest.fixture
def task(rng):
    """A linear model of 4 labels on 21 examples; the last label holds nowhere."""
    model = jt.models.mlp(4, hidden=())
    targets = (rng.random((21, 4)) < [0.5, 0.2, 0.7, 0]).astype(np.int32)
    data = {"image": rng.normal(size=(21, 5)).astype(np.float32), "label": targets}
    params, state = jt.multilabel_classification(model).init(jax.random.key(0), data)
    params = jax.tree.map(lambda w: w + jnp.asarray(rng.normal(size=w.shape), w.dtype), params)
    head = {name: np.asarray(leaf) for name, leaf in params["model"]["head"].items()}
    return model, jt.TrainState.of(params, state), data, data["image"] @ head["kernel"] + head["bias"]


@pytest.mark.parametrize(("devices", "mode"), [(None, "jit"), (4, "jit"), (4, "pmap")])
def test_evaluation_is_that_of_the_whole(task, devices, mode):
    """Weights reach the loss alone, padding nothing; mAP is that of all examples at once."""
    model, state, data, logits = task
    weight, rows = np.linspace(0, 2, 21).astype(np.float32), []
    for start in range(0, 21, 8):
        part = {name: column[start : start + 8] for name, column in {**data, "weight": weight}.items()}
        size = len(part["weight"])
        padded = {name: np.concatenate([c, np.full((8 - size, *c.shape[1:]), -9, c.dtype)]) for name, c in part.items()}
        rows.append({**padded, "mask": np.r_[np.ones(size), np.zeros(8 - size)]})
    objective = jt.multilabel_classification(model, pos_weight=[1, 2, 0.5, 1], label_smoothing=0.1)
    mesh = None if devices is None else jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    measure = jt.measures.multilabel_classification(model)
    got = jt.evaluate(objective, state, rows, mesh=mesh, mode=mode, measures=measure)
    losses = reference(logits, data["label"], np.array([1, 2, 0.5, 1]), 0.1)
    loss, right = np.sum(weight * losses) / np.sum(weight), (logits > 0) == data["label"]
    scores = got.pop("scores")
    assert got == pytest.approx(
        {
            "loss": loss,
            "multilabel_classification": loss,
            "binary_accuracy": right.mean(),
            "exact_match": right.all(axis=1).mean(),
        },
        rel=1e-5,
    )
    expected = [sk.average_precision_score(data["label"][:, k], logits[:, k]) for k in range(3)]
    np.testing.assert_allclose(scores.average_precision[:3], expected)
    assert scores.left_out == (3,)
    assert scores.mean_average_precision == pytest.approx(np.mean(expected))
    assert scores.exact_match == pytest.approx(got["exact_match"])


def test_what_is_refused(task):
    model, state, data, _ = task
    for options, told in (
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"pos_weight": [1, -1]}, "finite and not negative"),
        ({"pos_weight": "balanced"}, "one number for each label"),
    ):
        with pytest.raises(jt.InputError, match=told):
            jt.multilabel_classification(model, **options)
    objective = jt.multilabel_classification(model)

    def init(batch):
        return jt.init(objective, optax.sgd(0.1), 0, batch)

    with pytest.raises(jt.InputError, match=r"One class per example is for jt\.classification"):
        init({**data, "label": np.zeros(21, np.int32)})
    with pytest.raises(jt.InputError, match="must hold 0 or 1 for each label, or probabilities; got 2"):
        init({**data, "label": data["label"] * 2})
    bad = {**data, "label": np.full((21, 4), np.nan, np.float32)}
    with pytest.raises(jt.InputError, match="got nan"):
        init(bad)
    soft = {**data, "label": np.full((21, 4), 0.5, np.float32)}
    with pytest.raises(jt.InputError, match="targets must be 0 or 1"):
        jt.evaluate(objective, state, [soft], measures=jt.measures.multilabel_classification(model))


def test_labels_of_a_column_each(task):
    """They are one column of all, in the order of their names; also of the measure."""
    model, state, data, _ = task
    names = ("d", "a", "c", "b")
    apart = {"image": data["image"], **{name: data["label"][:, k] for k, name in enumerate(names)}}
    whole, parts = (
        jt.evaluate(
            jt.multilabel_classification(model, label=label),
            state,
            [batch],
            measures=jt.measures.multilabel_classification(model, label=label),
        )
        for label, batch in (("label", data), (names, apart))
    )
    np.testing.assert_array_equal(whole.pop("scores").average_precision, parts.pop("scores").average_precision)
    assert whole == parts
    for label in ((), ("a", "a"), 3):
        with pytest.raises(jt.InputError, match="label= names an entry of the batch, or several different ones"):
            jt.multilabel_classification(model, label=label)
    with pytest.raises(jt.InputError, match="must hold 0 or 1 for each label, or probabilities; got 2"):
        jt.init(jt.multilabel_classification(model, label=names), optax.sgd(0.1), 0, {**apart, "c": 2 * apart["d"] + 2})
    objective = jt.multilabel_classification(model, label=("a", "label"))
    with pytest.raises(jt.InputError, match=r"'label' must hold one label, 0 or 1, \[batch\], to stand beside others"):
        jt.init(objective, optax.sgd(0.1), 0, {**apart, "label": data["label"]})


def test_a_term_that_reads_an_unknown_output_is_told_the_known_ones(task):
    model, _, data, _ = task
    forward = jt.Forward.of(model, "image")

    def loss(outputs, params, state, batch, ctx):
        return outputs[forward]["scores"].sum(), state, {}

    with pytest.raises(
        jt.InputError, match=r"objective 'mine' reads 'scores', .*: model 'model' gives .*logits.*; the b"
    ):
        jt.init(jt.Objective("mine", (forward,), loss), optax.sgd(0.1), 0, data)
