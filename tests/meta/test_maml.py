"""MAML over any objective: its gradient against a written-out loop, its options, devices and calls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

TASKS, RATE = 4, 0.2


def init(key, x):
    first, second = jax.random.split(key)
    body = {"w": jax.random.normal(first, (3, 6)), "b": jnp.zeros(6)}
    return {"params": {"body": body, "head": {"w": jax.random.normal(second, (6, 2))}}}


def apply(variables, x, *, train, key):
    params = variables["params"]
    hidden = jnp.tanh(x @ params["body"]["w"] + params["body"]["b"][None])
    return {"logits": hidden @ params["head"]["w"]}, {}


MODEL = jt.Model(init, apply, stages=("body", "head"))
OBJECTIVE = jt.regression(MODEL)


def episodes(rng, dtype=np.float32, tasks=TASKS):
    def part(count):
        return {
            "input": rng.normal(size=(tasks, count, 3)).astype(dtype),
            "value": rng.normal(size=(tasks, count, 2)).astype(dtype),
        }

    return {"support": part(5), "query": part(7)}


def meta_loss(objective, params, state, batch):
    """One program, not one an operation."""
    return jax.jit(lambda *given: objective(*given, jt.Context(key=jax.random.key(0)))[0])(params, state, batch)


def written_out(params, batch, steps, adapted=("body", "head"), rates=None):
    """MAML by hand: a Python loop over tasks and steps."""

    def loss(params, part):
        hidden = jnp.tanh(part["input"] @ params["body"]["w"] + params["body"]["b"][None])
        return jnp.mean((hidden @ params["head"]["w"] - part["value"]) ** 2)

    total = 0.0
    for task in range(TASKS):
        support, query = (jax.tree.map(lambda x: x[task], batch[part]) for part in ("support", "query"))  # noqa: B023
        fast = params["model"]
        for step in range(steps):
            gradient = jax.grad(loss)(fast, support)
            if rates is None:
                change = jax.tree.map(lambda g: RATE * g, gradient)
            else:
                change = jax.tree.map(lambda g, r: r(step) * g, gradient, rates)  # noqa: B023
            fast = {k: jax.tree.map(jnp.subtract, v, change[k]) if k in adapted else v for k, v in fast.items()}
        total += loss(fast, query)
    return total / TASKS


@pytest.mark.parametrize(
    ("steps", "adapt", "names", "at_once", "head"),
    [
        (1, ".*", ("body", "head"), None, 1),
        pytest.param(3, ".*", ("body", "head"), 1, 1, marks=pytest.mark.slow),
        (3, ".*", ("body", "head"), 2, 0),  # a head of zeros: the body's gradients are exactly zero at first
        (3, "head", ("head",), None, 1),
        pytest.param(1, "body", ("body",), 2, 0, marks=pytest.mark.slow),
    ],
)
def test_value_and_gradient_equal_the_loop_written_out(steps, adapt, names, at_once, head, rng, x64):
    batch = episodes(rng, np.float64)
    objective = jt.maml(OBJECTIVE, inner=optax.sgd(RATE), steps=steps, adapt=adapt, at_once=at_once)
    params, state = objective.init(jax.random.key(0), batch)
    params["model"]["head"]["w"] *= head
    got = jax.jit(jax.value_and_grad(lambda p: meta_loss(objective, p, state, batch)))(params)
    expected = jax.jit(jax.value_and_grad(lambda p: written_out(p, batch, steps, names)))(params)
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("inner", "rates"),
    [
        (optax.adam(0.01), None),
        pytest.param(optax.sgd(0.1, momentum=0.9), jt.meta.per_parameter(0.5), marks=pytest.mark.slow),
        (optax.sgd(0.1), jt.meta.per_layer_and_step(0.5)),
    ],
)
def test_gradients_equal_finite_differences(inner, rates, rng, x64):
    from tests.meta.test_adapt import directional_error

    batch = episodes(rng, np.float64)
    objective = jt.maml(OBJECTIVE, inner=inner, steps=5, rates=rates)
    params, state = objective.init(jax.random.key(0), batch)
    outer = jax.jit(lambda p: meta_loss(objective, p, state, batch))
    assert directional_error(outer, jax.jit(jax.grad(outer))(params), params, rng) < 1e-5


RATES_OF = ("model/body/b", "model/body/w", "model/head/w")


def test_learned_rates_scale_each_step(rng, x64):
    batch = episodes(rng, np.float64)
    objective = jt.maml(OBJECTIVE, inner=optax.sgd(1.0), steps=2, rates=jt.meta.per_layer_and_step(0.1))
    params, state = objective.init(jax.random.key(0), batch)
    steps = {path: jnp.array([0.1, 0.1]) * number for number, path in enumerate(RATES_OF, start=1)}
    steps = {path: rate.at[1].multiply(3) for path, rate in steps.items()}
    by_hand = {
        "body": {k: (lambda s, k=k: steps[f"model/body/{k}"][s]) for k in ("w", "b")},
        "head": {"w": lambda s: steps["model/head/w"][s]},
    }
    assert sorted(jt.tree.leaves_by_path(params["rates"])) == list(RATES_OF)
    learned = {"model": {"body": {k: steps[f"model/body/{k}"] for k in "bw"}, "head": {"w": steps["model/head/w"]}}}
    got = meta_loss(objective, {**params, "rates": learned}, state, batch)
    expected = jax.jit(lambda p: written_out(p, batch, 2, rates=by_hand))(params)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.slow
def test_multi_step_weights_count_every_query_loss(rng, x64):
    batch = episodes(rng, np.float64)
    weights = jnp.array([0.2, 0.3, 0.5])
    objective = jt.maml(OBJECTIVE, inner=optax.sgd(RATE), steps=3, multi_step=lambda step: weights)
    params, state = objective.init(jax.random.key(0), batch)
    expected = jax.jit(lambda p: sum(w * written_out(p, batch, n + 1) for n, w in enumerate(weights)))(params)
    np.testing.assert_allclose(meta_loss(objective, params, state, batch), expected, rtol=1e-10)


@pytest.mark.slow
def test_annealing_switches_the_second_order_on(rng, x64):
    batch = episodes(rng, np.float64)

    def gradient(first_order, step):
        objective = jt.maml(OBJECTIVE, inner=optax.sgd(RATE), steps=2, first_order=first_order)
        params, state = objective.init(jax.random.key(0), batch)
        ctx = jt.Context(step=step, key=jax.random.key(0))
        return jax.tree.leaves(jax.jit(jax.grad(lambda p: objective(p, state, batch, ctx)[0]))(params))

    for step, same in ((3, True), (7, False)):
        annealed = gradient(lambda s: s < 5, step)
        for a, b in zip(annealed, gradient(same, step), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
    first, second = gradient(True, 0), gradient(False, 0)
    assert any(float(jnp.max(jnp.abs(a - b))) > 1e-3 for a, b in zip(first, second, strict=True))


def test_it_takes_sums_penalties_and_schedules(rng):
    batch = episodes(rng)
    anchor = {"model": jax.tree.map(jnp.zeros_like, init(jax.random.key(5), None)["params"])}
    task = 0.5 * OBJECTIVE + (lambda step: 1.0 + step) * jt.l2_sp(anchor, strength=0.1)
    objective = jt.maml(task, inner=optax.sgd(0.1), steps=1) + 0.01 * jt.l2(only="head")
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)
    step = jt.train_step(objective, optax.sgd(0.1))
    _, metrics = step(state, batch)
    assert set(metrics) == {"loss", "maml", "regression", "l2_sp", "l2"}
    assert np.isfinite(list(map(float, metrics.values()))).all()


def normed_model():
    """A small net with batch norm, written out."""

    def init(key, x):
        first, second = jax.random.split(key)
        body, head = jax.random.normal(first, (x[0].size, 8)), jax.random.normal(second, (8, 3))
        return {"params": {"body": body, "head": head}, "stats": {"mean": jnp.zeros(8)}}

    def apply(variables, x, *, train, key, axis=None):
        h = x.reshape(x.shape[0], -1) @ variables["params"]["body"]
        mean = jnp.mean(h, axis=0) if train else variables["stats"]["mean"]
        h = jnp.tanh(h - mean[None])
        return {"logits": h @ variables["params"]["head"]}, {"stats": {"mean": mean}}

    return jt.Model(init, apply)


def image_episodes(rng, tasks=TASKS):
    def part(count):
        labels = np.tile(np.arange(count) % 3, (tasks, 1))
        return {"image": rng.normal(size=(tasks, count, 4, 4, 1)).astype(np.float32), "label": labels}

    return {"support": part(6), "query": part(9)}


@pytest.mark.parametrize("statistics", [jt.meta.transductive, jt.meta.running])
def test_query_examples_meet_only_where_asked(statistics, rng):
    """Other query images change an example's loss under `transductive`, and leave it to the bit under `running`."""
    batch = image_episodes(rng, tasks=1)
    model = normed_model()
    objective = jt.maml(jt.classification(model), inner=optax.sgd(0.1), steps=2, statistics=statistics)
    params, state = objective.init(jax.random.key(0), batch)

    def losses(query):
        def single(row):
            mask = np.zeros((1, 9), np.float32)
            mask[0, row] = 1
            part = {**batch, "query": {**query, "mask": mask}}
            return float(meta_loss(objective, params, state, part))

        return single(0)

    other = {**batch["query"], "image": batch["query"]["image"].copy()}
    other["image"][0, 1:] = 5.0
    same = losses(batch["query"]) == losses(other)
    assert same == (statistics is jt.meta.running)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "at_once"), [pytest.param("jit", None, marks=pytest.mark.slow), ("jit", 4), ("pmap", 1)]
)
def test_tasks_split_over_devices_give_the_same_numbers(mode, at_once, rng):
    batch = image_episodes(rng, tasks=8)
    objective = jt.maml(jt.classification(normed_model()), inner=optax.sgd(0.1), steps=2, at_once=at_once)
    optimizer = optax.sgd(0.1)

    def run(**kwargs):
        state = jt.init(objective, optimizer, jax.random.key(0), batch)
        step = jt.train_step(objective, optimizer, **kwargs)
        for _ in range(3):
            state, metrics = step(state, batch)
        return jax.device_get((state.params, metrics))

    mesh = jax.make_mesh((4,), ("tasks",), devices=jax.devices()[:4])
    (one, scores), (four, more) = run(), run(mesh=mesh, mode=mode)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(a)), 1e-3)
    np.testing.assert_allclose(scores["accuracy"], more["accuracy"], rtol=1e-6)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.slow
def test_steps_in_one_call_are_the_steps_one_by_one(mode, rng):
    pool = {"x": jnp.asarray(rng.normal(size=(50, 3)).astype(np.float32))}

    def sample(key, data):
        rows = jax.random.randint(key, (TASKS, 12), 0, 50)
        x = data["x"][rows]
        parts = {"input": x, "value": jnp.sin(x[..., :2])}
        return {"support": {k: v[:, :5] for k, v in parts.items()}, "query": {k: v[:, 5:] for k, v in parts.items()}}

    objective = jt.maml(OBJECTIVE, inner=optax.sgd(0.1), steps=2)
    mesh = jax.make_mesh((2,), ("tasks",), devices=jax.devices()[:2]) if mode == "pmap" else None

    def run(per_call):
        state = jt.init(objective, optax.adam(1e-2), jax.random.key(0), sample(jax.random.key(1), pool))
        step = jt.train_step(objective, optax.adam(1e-2), sample=sample, steps_per_call=per_call, mesh=mesh, mode=mode)
        for _ in range(6 // per_call):
            state, _ = step(state, pool)
        return state

    by_one, by_three = run(1), run(3)
    assert int(by_one.step) == int(by_three.step) == 6
    chex.assert_trees_all_equal(by_one.params, by_three.params)


def test_misuse_is_one_clear_error(rng):
    batch = episodes(rng)
    key, optimizer = jax.random.key(0), optax.sgd(0.1)

    def start(batch=batch, objective=OBJECTIVE, **kwargs):
        jt.init(jt.maml(objective, **{"inner": optax.sgd(0.1), "steps": 1, **kwargs}), optimizer, key, batch)

    with pytest.raises(jt.InputError, match="'support'"):
        start(batch={"input": np.zeros((2, 3), np.float32)})
    with pytest.raises(jt.InputError, match="'tail'"):
        start(adapt="tail")
    with pytest.raises(jt.InputError, match="at_once must divide"):
        start(at_once=3)
    with pytest.raises(jt.InputError, match="at least one inner step"):
        start(steps=0, rates=jt.meta.per_parameter(0.1))
    with pytest.raises(
        jt.InputError, match=r"keeps 'model_ema', which moves once per update.*maml\(...\) \+ jt.averaged"
    ):
        start(objective=OBJECTIVE + jt.averaged(MODEL))
    with pytest.raises(jt.InputError, match="steps_per_call needs sample"):
        jt.train_step(OBJECTIVE, optimizer, steps_per_call=4)
