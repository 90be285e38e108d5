"""Weights of classes and of examples, several heads and columns of labels: against loops, PyTorch, sklearn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import log_loss

import jaxtransfer as jt

KEY = jax.random.key(4)
B, C = 8, 4
V = np.array([0.5, 2.0, 0.0, 1.25])


def init(key, x):
    first, second = jax.random.split(key)
    params = {"w": jax.random.normal(first, (5, C)), "u": jax.random.normal(second, (5, 3))}
    return {"params": {**params, "bias": jnp.zeros(C), "shift": jnp.zeros(3)}}


def apply(variables, x, *, train, key):
    params = variables["params"]
    return {"logits": x @ params["w"] + params["bias"][None], "color": x @ params["u"] + params["shift"][None]}, {}


NET = jt.Model(init, apply, "net")


def a_batch(rows=B, seed=0, **more):
    rng = np.random.default_rng(seed)
    batch = {"image": rng.normal(size=(rows, 5)).astype(np.float32), "label": rng.integers(0, C, rows)}
    batch["color"] = rng.integers(0, 3, rows)
    return {**batch, "weight": rng.exponential(size=rows).astype(np.float32), **more}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - logits.max(1, keepdims=True) - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))[:, None]


def loop(logits, labels, v, m, smoothing):
    """Σ m_i ℓ_i / Σ m_i v(y_i), one example and one class at a time."""
    above = below = 0.0
    for i, row in enumerate(log_softmax(logits)):
        for c in range(len(row)):
            target = float(labels[i] == c) if np.ndim(labels) == 1 else float(labels[i][c])
            above -= m[i] * v[c] * ((1 - smoothing) * target + smoothing / len(row)) * row[c]
            below += m[i] * v[c] * target
    return above / below


def start(objective, batch):
    return jt.init(objective, optax.sgd(0.1), KEY, batch)


def logits_of(state, batch, name="w"):
    return np.asarray(batch["image"], np.float64) @ np.asarray(state.params["net"][name], np.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["integers", "probabilities"])
def test_the_weighted_mean(kind, smoothing):
    batch = a_batch(mask=np.array([1, 1, 0, 1, 1, 0, 1, 1], np.float32))
    if kind == "probabilities":
        batch["label"] = np.random.default_rng(1).dirichlet(np.ones(C), B).astype(np.float32)
    without = {name: entry for name, entry in batch.items() if name != "weight"}
    for rows, v in ((batch, V), (batch, np.ones(C)), (without, V)):
        objective = jt.classification(NET, label_smoothing=smoothing, weight=list(v))
        state = start(objective, rows)
        loss, _, metrics = objective(state.params, state.state, rows, jt.Context(key=KEY))
        m = rows["mask"] * rows.get("weight", np.ones(B))
        expected = loop(logits_of(state, rows), rows["label"], v, m, smoothing)
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        assert float(metrics["classification"].value) == pytest.approx(expected, rel=1e-5)


def test_it_is_the_log_loss_of_sklearn_and_scores_are_not_weighted():
    batch, objective = a_batch(), jt.classification(NET)
    state = start(objective, batch)
    got = jt.evaluate(objective, state, [batch])
    logits = logits_of(state, batch)
    by_example = log_loss(batch["label"], np.exp(log_softmax(logits)), sample_weight=batch["weight"], labels=range(C))
    assert got["classification"] == pytest.approx(by_example, rel=1e-5)
    assert got["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == batch["label"]))
    weighted = jt.evaluate(jt.classification(NET, weight=V), state, [batch])
    both = batch["weight"] * V[batch["label"]]
    expected = log_loss(batch["label"], np.exp(log_softmax(logits)), sample_weight=both, labels=range(C))
    assert weighted["classification"] == pytest.approx(expected, rel=1e-5)
    assert weighted["accuracy"] == got["accuracy"]


def test_class_weights_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    batch, ours = a_batch(), jt.losses.cross_entropy
    logits = np.random.default_rng(3).normal(size=(B, C)).astype(np.float32)
    for smoothing in (0.0, 0.3):
        options = {"weight": torch.tensor(V, dtype=torch.float32), "label_smoothing": smoothing}
        labels = torch.tensor(batch["label"])
        each = torch.nn.functional.cross_entropy(torch.tensor(logits), labels, reduction="none", **options)
        got = ours(jnp.asarray(logits), batch["label"], label_smoothing=smoothing, weight=jnp.asarray(V))
        np.testing.assert_allclose(got, each, rtol=1e-5, atol=1e-6)
        mean = torch.nn.functional.cross_entropy(torch.tensor(logits), labels, **options)
        weights = jt.losses.class_weights(jnp.asarray(logits), batch["label"], V)
        assert float(got.sum() / weights.sum()) == pytest.approx(float(mean), rel=1e-5)


def test_evaluation_divides_once():
    parts = [a_batch(seed=1), a_batch(seed=2, mask=np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32))]
    parts[0]["mask"] = np.ones(B, np.float32)
    objective = jt.classification(NET, weight=V, label_smoothing=0.1)
    state = start(objective, parts[0])
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    got, m = jt.evaluate(objective, state, parts), whole["mask"] * whole["weight"]
    expected = loop(logits_of(state, whole), whole["label"], V, m, 0.1)
    assert got["classification"] == pytest.approx(expected, rel=1e-5)
    assert got["loss"] == pytest.approx(expected, rel=1e-5)
    color = jt.classification(NET, output="color", label="color", weight=[1, 5, 0.1]).named("color")
    both = jt.evaluate((0.5 * objective + 3 * (color + 0.1 * jt.l2())).on("s"), state, [{"s": part} for part in parts])
    second = loop(logits_of(state, whole, "u"), whole["color"], [1, 5, 0.1], m, 0)
    norm = 0.5 * sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(state.params))
    assert both["loss"] == pytest.approx(0.5 * expected + 3 * second + 0.3 * norm, rel=1e-5)
    assert both["s/color"] == pytest.approx(second, rel=1e-5)


@pytest.mark.slow
def test_devices_agree():
    batch = a_batch(mask=np.array([1, 1, 0, 1, 1, 0, 1, 1], np.float32))
    value = np.random.default_rng(5).normal(size=(B, 3)).astype(np.float32)
    batch["value"] = value
    objective = jt.classification(NET, weight=V, label_smoothing=0.1)
    objective = objective + jt.regression(NET, view="image", output="color")
    after = []
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    for options in ({}, {"mesh": mesh}, {"mesh": mesh, "mode": "pmap"}):
        state, metrics = jt.train_step(objective, optax.sgd(0.1), **options)(start(objective, batch), batch)
        scores = jt.evaluate(objective, state, [batch], **options)
        after.append(
            [float(metrics["loss"]), scores["classification"], *map(np.asarray, jax.tree.leaves(state.params))]
        )
    for other in after[1:]:
        for one, two in zip(after[0], other, strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_an_example_of_weight_0_reaches_nothing_but_the_scores():
    batch = a_batch()
    batch["weight"][2] = 0
    spoilt = {**batch, "image": batch["image"].copy()}
    spoilt["image"][2] = np.nan
    rest = jax.tree.map(lambda rows: np.delete(rows, 2, 0), batch)
    objective = jt.classification(NET, weight=V) + jt.regression(NET, view="image", output="color", label="truth")
    for rows in (batch, spoilt, rest):
        rows["truth"] = np.ones((len(rows["image"]), 3), np.float32)
    params, state = objective.init(KEY, batch)

    def loss(shifts, rows):  # of what the inputs do not multiply: 0 · NaN is the model's own
        return objective({"net": {**params["net"], **shifts}}, state, rows, jt.Context(key=KEY))[0]

    shifts, compiled = {name: params["net"][name] for name in ("bias", "shift")}, jax.jit(jax.value_and_grad(loss))

    def both(rows):
        return compiled(shifts, rows)

    expected = both(rest)
    for rows in (batch, spoilt):
        value, grads = both(rows)
        assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
        chex.assert_trees_all_close(grads, expected[1], rtol=1e-5, atol=1e-7)
    assert float(objective(params, state, batch, jt.Context(key=KEY))[2]["accuracy"].count) == B


def test_regression_is_weighted():
    batch = a_batch(mask=np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32), truth=np.ones((B, 3), np.float32))
    for objective in (
        jt.regression(NET, view="image", output="color", label="truth"),
        jt.regression(NET, view="image", output="color", target="truth"),
    ):
        state = start(objective, batch)
        got = jt.evaluate(objective, state, [batch])["regression"]
        errors = ((logits_of(state, batch, "u") - 1) ** 2).mean(1)
        assert got == pytest.approx(np.average(errors, weights=batch["mask"] * batch["weight"]), rel=1e-5)
    with pytest.raises(jt.InputError, match="two words for one entry"):
        jt.regression(NET, label="a", target="b")


def test_a_weight_that_is_predicted_weighs_nothing():
    batch = a_batch()
    batch["weight"] = -np.ones((B, 3), np.float32)  # kilograms, say
    objective = jt.regression(NET, view="image", output="color", label="weight")
    state = start(objective, batch)
    expected = np.mean((logits_of(state, batch, "u") + 1) ** 2)
    assert jt.evaluate(objective, state, [batch])["regression"] == pytest.approx(expected, rel=1e-5)


def test_several_heads_and_columns_are_several_terms_of_one_run():
    batch, runs = a_batch(), []

    def counted(*args, **how):
        runs.append(1)
        return apply(*args, **how)

    net = jt.Model(init, counted, "net")
    color = jt.classification(net, output="color", label="color", weight=[1, 2, 3]).named("color")
    objective = jt.classification(net) + 0.5 * color
    state = start(objective, batch)
    runs.clear()
    loss, _, metrics = objective(state.params, state.state, batch, jt.Context(key=KEY))
    assert runs == [1]
    first = loop(logits_of(state, batch), batch["label"], np.ones(C), batch["weight"], 0)
    second = loop(logits_of(state, batch, "u"), batch["color"], [1, 2, 3], batch["weight"], 0)
    assert float(loss) == pytest.approx(first + 0.5 * second, rel=1e-5)
    assert set(metrics) == {"classification", "accuracy", "color", "color/accuracy"}
    right = logits_of(state, batch, "u").argmax(1) == batch["color"]
    assert float(metrics["color/accuracy"].value) == pytest.approx(right.mean())
    with pytest.raises(jt.InputError, match=r"metric 'accuracy'.*named"):
        start(jt.classification(net) + jt.classification(net, output="color", label="color"), batch)


@pytest.mark.parametrize(
    "wrong", [[1, -1, 1, 1], [1, np.nan, 1, 1], [1, np.inf, 1, 1], np.zeros(C), 1.0, "abcd", [[1] * C]]
)
def test_what_can_be_no_weights_of_classes_is_refused(wrong):
    with pytest.raises(jt.InputError, match="weight must be one number for each class"):
        jt.classification(NET, weight=wrong)


def test_what_does_not_fit_is_refused_at_init():
    batch = a_batch()
    cases = [
        (jt.classification(NET, weight=[1, 2, 3]), batch, "weight must have one entry for each of the 4 classes"),
        (
            jt.classification(NET, output="colour"),
            batch,
            r"unknown output of model 'net' 'colour' \(did you mean 'color'",
        ),
        (jt.regression(NET, view="image", output="colour", label="color"), batch, "unknown output of model 'net'"),
        (jt.classification(NET, label="colour"), batch, r"batch\['colour'\]"),
        (jt.classification(NET, output="color"), {**batch, "label": np.full(B, 3)}, r"labels must be in \[0, 3\)"),
        (jt.classification(NET, label="shape"), {**batch, "shape": np.full(B, 9)}, "labels of 'shape' must be in"),
    ]
    for value in (-1, np.nan, np.inf):
        weight = np.where(np.arange(B) == 3, value, 1.0)
        cases.append((jt.classification(NET), {**batch, "weight": weight}, "weight must be finite and not negative"))
        cases.append((jt.classification(NET).on("s"), {"s": {**batch, "weight": weight}}, "weight must be finite"))
    for shape in ((B, 1), (1, B)[::-1], (B, 2)):
        cases.append((jt.classification(NET), {**batch, "weight": np.ones(shape)}, "weight must have one entry per"))
    for objective, rows, message in cases:
        with pytest.raises(jt.InputError, match=message):
            start(objective, rows)
    padded = {**batch, "mask": np.arange(B) < 6, "weight": np.where(np.arange(B) < 6, 1, np.nan)}
    assert np.isfinite(jt.evaluate(jt.classification(NET), start(jt.classification(NET), padded), [padded])["loss"])


def test_inside_of_a_program_such_a_weight_makes_the_loss_nan():
    objective = jt.classification(NET)
    params, state = objective.init(KEY, a_batch())
    wrong = a_batch(weight=jnp.where(jnp.arange(B) == 3, -1.0, 1.0))
    loss = jax.jit(lambda batch: objective(params, state, batch, jt.Context(key=KEY))[0])(wrong)
    assert np.isnan(float(loss))
