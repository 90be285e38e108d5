"""Records tell the gradient's norm, the learning rate and the weights that follow schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)


def linear():
    def init(key, x):
        return {"params": {"w": jnp.zeros((x.shape[1], 2)), "b": jnp.ones(2)}}

    def apply(variables, x, *, train, key):
        return {"logits": x @ variables["params"]["w"] + variables["params"]["b"][None]}, {}

    return jt.Model(init, apply)


def batches(count=6, rows=8):
    rng = np.random.default_rng(0)
    return [
        {"input": rng.normal(size=(rows, 3)).astype(np.float32), "value": rng.normal(size=(rows, 2)).astype(np.float32)}
        for _ in range(count)
    ]


RATE = optax.linear_schedule(0.1, 0.0, 10)


def decay(step):
    return 0.5 / (1 + step)


def objective_of():
    return jt.regression(linear()) + 2 * (decay * jt.l2()) + 0.1 * jt.l2(only="b").named("bias")


def by_hand(data):
    """The norm of each step's gradient, in double precision; w and b follow plain descent at the scheduled rate."""
    w, b, norms = np.zeros((3, 2)), np.ones(2), []
    for step, batch in enumerate(data):
        x, y = (np.asarray(batch[name], np.float64) for name in ("input", "value"))
        error = 2 * (x @ w + b - y) / y.size
        weight = 2 * 0.5 / (1 + step)
        dw, db = x.T @ error + weight * w, error.sum(0) + weight * b + 0.1 * b
        norms.append(np.sqrt((dw**2).sum() + (db**2).sum()))
        rate = 0.1 * (1 - step / 10)
        w, b = w - rate * dw, b - rate * db
    return norms


def test_records_of_fit():
    data, optimizer = batches(), optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
    fitted = jt.fit(objective_of(), optimizer, data, steps=6, log_every=2, save_every=6, progress=False)
    norms = by_hand(data)
    for number, record in enumerate(fitted.history):
        last = 2 * number + 1
        assert record["train/gradient_norm"] == pytest.approx(np.mean(norms[last - 1 : last + 1]), rel=1e-5)
        assert record["train/learning_rate"] == pytest.approx(0.1 * (1 - last / 10), rel=1e-5)
        assert record["train/weight/l2"] == pytest.approx(1 / (1 + last), rel=1e-5)
        assert "train/weight/bias" not in record  # a number
    assert "gradient" not in repr(fitted)
    plain = jt.fit(objective_of(), optax.sgd(RATE), data, steps=6, log_every=2, save_every=6, progress=False)
    assert "train/learning_rate" not in plain.history[-1]
    assert plain.history[-1]["train/loss"] == fitted.history[-1]["train/loss"]


def test_steps_tell_where_they_are_asked():
    data = batches()[0]
    rates = {"w": optax.inject_hyperparams(optax.sgd)(0.25), "b": optax.inject_hyperparams(optax.adam)(0.5)}
    optimizer = optax.chain(optax.clip(1.0), jt.optim.by_path(rates))
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    seen = []
    for options in ({}, {"mesh": mesh, "mode": "pmap"}):
        state = jt.init(objective_of(), optimizer, KEY, data)
        _, metrics = jt.train_step(objective_of(), optimizer, watch=True, **options)(state, data)
        assert sorted(float(metrics[f"learning_rate/{number}"]) for number in (0, 1)) == [0.25, 0.5]
        assert float(metrics["weight/l2"]) == 1
        seen.append(float(metrics["gradient_norm"]))
    assert seen == pytest.approx([by_hand([data])[0]] * 2, rel=1e-5)
    state = jt.init(objective_of(), optimizer, KEY, data)
    _, metrics = jt.train_step(objective_of(), optimizer)(state, data)
    assert set(metrics) == {"loss", "regression", "l2", "bias"}


def test_steps_in_one_call_tell_the_last_rate():
    data, optimizer = batches()[0], optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
    step = jt.train_step(objective_of(), optimizer, sample=lambda key, data: data, steps_per_call=3, watch=True)
    _, metrics = step(jt.init(objective_of(), optimizer, KEY, data), data)
    assert float(metrics["learning_rate"]) == pytest.approx(0.08, rel=1e-5)
    assert float(metrics["weight/l2"]) == pytest.approx(1 / 3, rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(np.mean(by_hand([data] * 3)), rel=1e-5)


def test_a_gradient_that_the_optimiser_mends_ends_no_run():
    def loss(outputs, params, state, batch, ctx):
        value = jnp.sum(jnp.sqrt(params["p"] * batch["scale"][0]))  # at scale 0 the gradient is infinite times 0
        return value, state, {"root": jt.Mean(value, jnp.ones(()))}

    root = jt.Objective("root", (), loss, setup=lambda key, batch: ({"p": jnp.ones(2)}, {}))
    data = [{"scale": np.full(2, scale, np.float32)} for scale in (1, 0, 1)]
    fitted = jt.fit(root, optax.apply_if_finite(optax.sgd(0.1), 3), data, steps=3, log_every=1, progress=False)
    assert ["train/gradient_norm" in record for record in fitted.history] == [True, False, True]
