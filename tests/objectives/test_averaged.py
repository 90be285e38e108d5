"""Averages that nothing runs in training: how they move, that they cost no forward, and that they are evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY, B, D = jax.random.key(2), 8, 4


def network(runs=None, dtype=jnp.float32):
    """A linear classifier with a running mean of its inputs; notes each trace in `runs`."""

    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (D, 3), dtype)}, "stats": {"mean": jnp.zeros(D)}}

    def apply(variables, x, *, train, key, axis=None):
        if runs is not None:
            runs.append(train)
        mean = variables["stats"]["mean"]
        new = 0.5 * mean + 0.5 * x.mean(0) if train else mean
        return {"logits": (x - mean[None]).astype(dtype) @ variables["params"]["w"]}, {"stats": {"mean": new}}

    return jt.Model(init, apply, "net")


def batches(count):
    rng = np.random.default_rng(1)
    return [
        {"image": rng.normal(size=(B, D)).astype(np.float32) + 1, "label": rng.integers(0, 3, B).astype(np.int32)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an average that is evaluated and selects, and what each step's weights and statistics were."""
    runs, data = [], batches(6)
    model = network(runs)
    objective = jt.classification(model) + jt.averaged(model, 0.75)
    both = jt.classification(model) + jt.classification(jt.ema(model)).named("average")
    out, seen = tmp_path_factory.mktemp("averaged") / "run", []

    def fit(steps):
        return jt.fit(
            objective, optax.sgd(0.5), data, steps=steps, out=out, save_every=1, keep=9, progress=False,
            eval_every=1, eval_data=data[:2], eval_objective=both, monitor="average/accuracy",
        )  # fmt: skip

    fit(3)
    fitted = fit(6)  # goes on from the third step
    state, step = jt.init(objective, optax.sgd(0.5), jax.random.key(0), data[0]), None
    step = jt.train_step(objective, optax.sgd(0.5))
    seen.append(jax.tree.map(np.array, state[2:4]))
    for batch in data:
        state, metrics = step(state, batch)
        seen.append(jax.tree.map(np.array, state[2:4]))
    return model, objective, data, fitted, seen, metrics


def test_it_follows_weights_and_statistics_once_per_update_and_is_resumed(run):
    _, _, _, fitted, seen, metrics = run
    slow = {"w": np.float64(seen[0][0]["net"]["w"]), "mean": np.zeros(D)}
    for params, state in seen[1:-1]:  # it moves at the start of a step
        new = {"w": params["net"]["w"], "mean": state["net"]["stats"]["mean"]}
        slow = {name: 0.75 * slow[name] + 0.25 * new[name] for name in slow}
    got = fitted.state.state["net_ema"]
    np.testing.assert_allclose(got["params"]["w"], slow["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["stats"]["mean"], slow["mean"], rtol=1e-5, atol=1e-6)
    assert set(metrics) == {"loss", "classification", "accuracy"}


def test_it_adds_no_forward():
    counts, data = [], batches(1)[0]
    for averages in (False, True):
        runs = []
        model = network(runs)
        objective = jt.classification(model) + jt.averaged(model) if averages else jt.classification(model)
        params, state = objective.init(KEY, data)
        runs.clear()
        jax.make_jaxpr(lambda *args, objective=objective: objective(*args, jt.Context(key=KEY))[0])(params, state, data)
        counts.append(len(runs))
    assert counts == [1, 1]


def test_fit_evaluates_and_selects_by_the_average_and_says_so(run):
    model, objective, data, fitted, _, _ = run
    last = fitted.history[-1] if "eval/loss" in fitted.history[-1] else fitted.history[-2]
    scores = [record["eval/average/accuracy"] for record in fitted.history if "eval/loss" in record]
    assert len(scores) == 6
    assert fitted.best["eval/average/accuracy"] == max(scores)
    alone = jt.evaluate(jt.classification(jt.ema(model)), fitted.state, data[:2])
    assert last["eval/average"] == pytest.approx(alone["classification"], rel=1e-6)
    assert last["eval/average"] != pytest.approx(last["eval/classification"], rel=1e-3)
    assert str(objective) == "classification(net) + averaged(net_ema)"


def test_what_is_evaluated_is_the_model_at_the_average(run):
    model, _, data, fitted, _, _ = run
    average = fitted.state.state["net_ema"]
    at = jt.TrainState.of({"net": average["params"]}, {"net": {"stats": average["stats"]}})
    expected = jt.evaluate(jt.classification(model), at, data[:2])
    assert jt.evaluate(jt.classification(jt.ema(model)), fitted.state, data[:2]) == expected
    teacher = jt.frozen(jt.ema(model), fitted.state)
    assert jt.evaluate(jt.classification(teacher), fitted.state, data[:2]) == expected
    rows = jt.representation.embed(teacher.model, teacher.variables.tree, data[:2], tap="logits").features
    assert rows.shape == (2 * B, 3)


def test_half_precision_is_averaged_in_full():
    model, data = network(dtype=jnp.bfloat16), batches(1)[0]
    objective = jt.classification(model) + jt.averaged(model, 0.999)
    optimizer = jt.optim.master_weights(optax.sgd(0.1))
    state, step = jt.init(objective, optimizer, KEY, data), jt.train_step(objective, optimizer)
    before = np.array(state.state["net_ema"]["params"]["w"])
    for _ in range(3):
        state, _ = step(state, data)
    after = state.state["net_ema"]["params"]["w"]
    assert after.dtype == jnp.float32
    assert 0 < np.abs(after - before).max() < 1e-2
    assert np.isfinite(jt.evaluate(jt.classification(jt.ema(model)), state, [data])["loss"])


def test_other_terms_may_run_the_average_that_it_keeps():
    """Then its statistics are those of its own runs, as without the term."""
    model, data = network(), batches(3)
    average = jt.ema(model, 0.5)
    plain = jt.classification(model) + jt.distillation(model, average, loss=jt.losses.hint)
    states = []
    for objective in (plain, plain + jt.averaged(average)):
        state, step = jt.init(objective, optax.sgd(0.1), KEY, data[0]), jt.train_step(objective, optax.sgd(0.1))
        for batch in data:
            state, _ = step(state, batch)
        states.append(state[2:4])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_turn_among_others_keeps_one():
    model, data = network(), batches(3)
    objective = jt.classification(model) + jt.averaged(model, 0.5)
    states = []
    for whole, optimizer in ((objective, optax.sgd(0.1)), jt.alternate(jt.Turn("one", objective, optax.sgd(0.1)))):
        state, step = jt.init(whole, optimizer, KEY, data[0]), jt.train_step(whole, optimizer)
        for batch in data:
            state, _ = step(state, batch)
        states.append(state.state["net_ema"])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_updates_of_one_step_are_followed_one_by_one():
    """From the first on, by hand: the average of the weights before each update but the first."""
    model, (batch, *_) = network(), batches(1)
    plain = jt.classification(model)
    objective, optimizer = jt.alternate(jt.Turn("one", plain + jt.averaged(model, 0.5), optax.sgd(0.3), repeat=3))
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    one = jt.train_step(plain, optax.sgd(0.3))
    alone = jt.init(plain, optax.sgd(0.3), KEY, batch)
    average = jax.tree.map(np.array, alone.params["net"])
    for updates in range(1, 6):
        alone, _ = one(alone, batch)
        weights = jax.tree.map(np.array, alone.params["net"])
        average = jax.tree.map(lambda old, new: (old + new) / 2, average, weights)
        if updates in (2, 5):  # the average is an update behind
            state, _ = step(state, batch)
            for a, b in zip(*map(jax.tree.leaves, (state.state["net_ema"]["params"], average)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_misuse_is_told():
    model, data = network(), batches(1)
    state = jt.init(jt.classification(model), optax.sgd(0.1), KEY, data[0])
    with pytest.raises(jt.InputError, match="runs 'net_ema', of which the state has nothing; it has 'net'"):
        jt.evaluate(jt.classification(jt.ema(model)), state, data)
    with pytest.raises(jt.InputError, match=r"no average 'net_ema' was kept in that state; it has \['net'\]"):
        jt.frozen(jt.ema(model), state)
    with pytest.raises(jt.InputError, match="give that one"):
        jt.frozen(jt.ema(model), {"params": {}})
    with pytest.raises(jt.InputError, match="average of model 'net', which nothing here trains"):
        jt.averaged(model).init(KEY, data[0])
    with pytest.raises(jt.InputError, match="in \\[0, 1\\]"):
        jt.averaged(model, 1.5)
    with pytest.raises(jt.InputError, match="two different models are named 'net_ema'"):
        jt.averaged(model) + jt.averaged(model)
