"""Reptile: its direction against a loop in NumPy, the order of its minibatches, what it leaves undifferentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.objective import Mean
from tests.meta.test_maml import MODEL, OBJECTIVE, RATE, TASKS, episodes, image_episodes, normed_model


def gradient(params, x, y):
    """The gradient of mean((tanh(x w + b) v - y)²), by hand."""
    hidden = np.tanh(x @ params["w"] + params["b"])
    error = 2 * (hidden @ params["v"] - y) / y.size
    back = error @ params["v"].T * (1 - hidden**2)
    return {"w": x.T @ back, "b": back.sum(0), "v": hidden.T @ error}


def flat(params):
    body, head = params["model"]["body"], params["model"]["head"]
    return {name: np.array(value) for name, value in (("w", body["w"]), ("b", body["b"]), ("v", head["w"]))}


def direction(params, batch, steps, momentum, adapted, size):
    """mean_t(θ - φ_t), and the mean query loss at φ_t, in NumPy."""
    total, loss = {name: np.zeros_like(value) for name, value in params.items()}, 0.0
    for task in range(TASKS):
        fast = dict(params)
        velocity = {name: np.zeros_like(value) for name, value in params.items()}
        x, y = (batch["support"][name][task] for name in ("input", "value"))
        for step in range(steps):
            rows = [(step * size + i) % len(x) for i in range(size)]
            for name, g in gradient(fast, x[rows], y[rows]).items():
                velocity[name] = g + momentum * velocity[name]
            fast = {n: v - RATE * velocity[n] if n in adapted else v for n, v in fast.items()}
        x, y = (batch["query"][name][task] for name in ("input", "value"))
        loss += np.mean((np.tanh(x @ fast["w"] + fast["b"]) @ fast["v"] - y) ** 2) / TASKS
        total = {name: total[name] + (params[name] - fast[name]) / TASKS for name in params}
    return total, loss


@pytest.mark.parametrize(
    ("steps", "momentum", "adapt", "adapted", "at_once", "size"),
    [
        pytest.param(1, 0.0, ".*", "wbv", None, None, marks=pytest.mark.slow),
        (4, 0.9, ".*", "wbv", 2, None),
        pytest.param(3, 0.0, "head", "v", 1, None, marks=pytest.mark.slow),
        pytest.param(4, 0.5, "body", "wb", None, 2, marks=pytest.mark.slow),
        (7, 0.0, ".*", "wbv", 2, 3),
    ],
)
def test_the_gradient_is_the_way_back_from_the_adapted_parameters(
    steps, momentum, adapt, adapted, at_once, size, rng, x64
):
    batch = episodes(rng, np.float64)
    inner = optax.sgd(RATE, momentum=momentum)
    objective = jt.meta.reptile(OBJECTIVE, inner=inner, steps=steps, adapt=adapt, at_once=at_once, inner_batch=size)
    params, state = objective.init(jax.random.key(0), batch)
    in_order = jt.Context(key=None)
    loss, got = jax.jit(jax.value_and_grad(lambda p: objective(p, state, batch, in_order)[0]))(params)
    expected, value = direction(flat(params), batch, steps, momentum, adapted, size or 5)
    np.testing.assert_allclose(loss, value, rtol=1e-10)
    for name, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-9, atol=1e-13)


def test_the_outer_step_goes_towards_the_adapted_parameters_by_its_weight(rng, x64):
    batch = episodes(rng, np.float64)
    objective = 0.5 * jt.meta.reptile(OBJECTIVE, inner=optax.sgd(RATE), steps=3) + 0.01 * jt.l2(only="head")
    optimizer = optax.sgd(0.7)
    state = jt.init(objective, optimizer, jax.random.key(0), batch)
    before = flat(state.params)
    expected, value = direction(before, batch, 3, 0.0, "wbv", 5)
    after, metrics = jt.train_step(objective, optimizer)(state, batch)
    for name, leaf in flat(after.params).items():
        decay = 0.01 * before[name] if name == "v" else 0
        np.testing.assert_allclose(leaf, before[name] - 0.7 * (0.5 * expected[name] + decay), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(metrics["reptile"], value, rtol=1e-10)
    assert set(metrics) == {"loss", "reptile", "regression", "l2"}


def sums(size, steps, step, count=5):
    """How often each of `count` support examples was drawn in each of three tasks: digits of the change of `w`."""

    def loss(outputs, params, state, batch, ctx):
        value = params["w"] * jnp.sum(batch["x"])
        return value, state, {"linear": Mean(value, jnp.ones(()))}

    linear = jt.Objective("linear", (), loss, setup=lambda key, batch: ({"w": jnp.zeros(())}, {}))
    objective = jt.meta.reptile(linear, inner=optax.sgd(1.0), steps=steps, inner_batch=size)
    key = jax.random.key(7)

    @jax.jit
    def gradient(support, step):
        batch = {"support": {"x": support}, "query": {"x": support}}
        return jax.grad(lambda p: objective(p, {}, batch, jt.Context(step=step, key=key))[0])({"w": jnp.zeros(())})

    digits = np.tile(100.0 ** np.arange(count), (3, 1)).astype(np.float64)
    found = []
    for task in range(3):  # the mean over tasks, of which all but one see zeros
        support = digits * (np.arange(3) == task)[:, None]
        total = 3 * gradient(support, step)["w"]
        found.append([round(float(total)) // 100**i % 100 for i in range(count)])
    return found


@pytest.mark.slow
def test_minibatches_go_through_the_support_set_before_they_repeat(x64):
    assert all(sorted(drawn) == [0, 1, 1, 1, 1] for drawn in sums(2, 2, 0))
    assert all(sorted(drawn) == [1, 1, 1, 1, 2] for drawn in sums(2, 3, 0))
    assert all(drawn == [2] * 5 for drawn in sums(5, 2, 0))
    left_out = [drawn.index(1) for step in range(3) for drawn in sums(1, 1, step)]
    assert len(set(left_out)) > 2  # by task and by step of the run


@pytest.mark.slow
def test_neither_the_inner_loop_nor_the_query_loss_is_differentiated(rng):
    batch = episodes(rng)

    def compiled(steps, transform):
        objective = jt.meta.reptile(OBJECTIVE, inner=optax.adam(0.01), steps=steps)
        params, state = objective.init(jax.random.key(0), batch)
        ctx = jt.Context(key=jax.random.key(0))
        return jax.jit(transform(lambda p: objective(p, state, batch, ctx)[0])).lower(params).compile()

    few, many, value = (compiled(n, f) for n, f in ((5, jax.grad), (50, jax.grad), (5, lambda f: f)))
    assert few.memory_analysis().temp_size_in_bytes == many.memory_analysis().temp_size_in_bytes
    assert few.cost_analysis()["flops"] < 1.05 * value.cost_analysis()["flops"]


def test_it_is_evaluated_as_maml_is(rng):
    batch, keywords = image_episodes(rng), {"inner": optax.sgd(0.1), "steps": 3}
    task = jt.classification(normed_model())
    for statistics in (jt.meta.transductive, jt.meta.running):
        objectives = [f(task, statistics=statistics, **keywords) for f in (jt.meta.reptile, jt.maml)]
        state = jt.init(objectives[0], optax.sgd(0.1), jax.random.key(0), batch)
        ours, theirs = (jt.evaluate(objective, state, [batch]) for objective in objectives)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["accuracy"] == theirs["accuracy"]


@pytest.mark.slow
def test_tasks_split_over_devices_give_the_same_numbers(rng):
    batch, optimizer, task = image_episodes(rng, tasks=8), optax.sgd(0.5), jt.classification(normed_model())

    def run(at_once=None, **kwargs):
        objective = jt.meta.reptile(task, inner=optax.sgd(0.1), steps=3, inner_batch=4, at_once=at_once)
        state = jt.init(objective, optimizer, jax.random.key(0), batch)
        step = jt.train_step(objective, optimizer, **kwargs)
        for _ in range(2):
            state, metrics = step(state, batch)
        return jax.device_get((state.params, metrics))

    one, mesh = run(), jax.make_mesh((4,), ("tasks",), devices=jax.devices()[:4])
    for four in (run(at_once=4, mesh=mesh), run(mesh=mesh, mode="pmap")):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(a)), 1e-3)


def test_a_sum_with_an_ordinary_term_shares_the_model(rng):
    batch = {**image_episodes(rng), "plain": {k: v[:, 0] for k, v in image_episodes(rng)["query"].items()}}
    task = jt.classification(normed_model())
    objective = jt.meta.reptile(task, inner=optax.sgd(0.1), steps=2, statistics=jt.meta.running) + task.on("plain")
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)
    moved, metrics = jt.train_step(objective, optax.sgd(0.1))(state, batch)
    assert float(jnp.max(jnp.abs(moved.state["model"]["stats"]["mean"]))) > 0
    assert np.isfinite(float(metrics["loss"]))


def test_misuse_is_one_clear_error(rng):
    batch = episodes(rng)

    def start(**kwargs):
        objective = jt.meta.reptile(jt.regression(MODEL), **{"inner": optax.sgd(0.1), "steps": 1, **kwargs})
        jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)

    for size in (0, 6):
        with pytest.raises(jt.InputError, match=f"inner_batch={size} for 5 examples"):
            start(inner_batch=size)
    with pytest.raises(jt.InputError, match="'tail'"):
        start(adapt="tail")
    with pytest.raises(jt.InputError, match="reptile: per_step"):
        start(statistics=jt.meta.per_step)
