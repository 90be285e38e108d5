"""Batch-norm statistics for each inner step, and what may depend on the query set under each choice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.objective import Mean

TASKS, STEPS, RATE, KEEP = 4, 2, 0.3, 0.8


def normalise(h, mean, square):
    return jnp.tanh((h - mean[None]) / jnp.sqrt(square - mean**2 + 1e-3)[None])


def model():
    """A perceptron with batch norm, its running statistics and a counter."""

    def init(key, x):
        first, second = jax.random.split(key)
        params = {"body": jax.random.normal(first, (x[0].size, 5)), "head": jax.random.normal(second, (5, 3))}
        return {"params": params, "stats": {"mean": jnp.zeros(5), "square": jnp.ones(5), "seen": jnp.zeros((), int)}}

    def apply(variables, x, *, train, key, axis=None):
        h, stats = x @ variables["params"]["body"], variables["stats"]
        mean, square = (jnp.mean(h, axis=0), jnp.mean(h**2, axis=0)) if train else (stats["mean"], stats["square"])
        logits = normalise(h, mean, square) @ variables["params"]["head"]
        moved = {name: KEEP * stats[name] + (1 - KEEP) * new for name, new in (("mean", mean), ("square", square))}
        return {"logits": logits}, {"stats": {**moved, "seen": stats["seen"] + 1} if train else stats}

    return jt.Model(init, apply)


def episodes(rng, tasks=TASKS, dtype=np.float32):
    def part(count):
        labels = np.tile(np.arange(count) % 3, (tasks, 1))
        return {"image": rng.normal(size=(tasks, count, 4)).astype(dtype), "label": labels}

    return {"support": part(6), "query": part(9)}


def task_loss(params, part, stats):
    """Cross-entropy, and the batch's own moments; `stats` None normalises by the latter."""
    h = part["image"] @ params["body"]
    own = jnp.mean(h, axis=0), jnp.mean(h**2, axis=0)
    logits = normalise(h, *(own if stats is None else stats)) @ params["head"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(h)), part["label"]]), own


def written_out(params, slots, batch, train, weights=None):
    """MAML++'s statistics by hand: the loss, and the slots after it; `slots` is (mean, square) by slot."""

    def task(support, query):
        fast, losses, moments = params, [], []
        for step in range(STEPS):
            gradient, own = jax.grad(task_loss, has_aux=True)(fast, support, None if train else slots[step])
            moments.append(own)
            fast = jax.tree.map(lambda p, g: p - RATE * g, fast, gradient)
            value, last = task_loss(fast, query, None if train else slots[step + 1])
            losses.append(value)
        value = losses[-1] if weights is None else sum(w * v for w, v in zip(weights, losses, strict=True))
        return value, [*moments, last]

    values, moments = jax.vmap(task)(batch["support"], batch["query"])
    new = [
        tuple(KEEP * old + (1 - KEEP) * jnp.mean(own, axis=0) for old, own in zip(slot, of_slot, strict=True))
        for slot, of_slot in zip(slots, moments, strict=True)
    ]
    return jnp.mean(values), new


def objective_of(**keywords):
    keywords = {"inner": optax.sgd(RATE), "steps": STEPS, "statistics": jt.meta.per_step, **keywords}
    return jt.maml(jt.classification(model()), **keywords)


@pytest.mark.parametrize(
    ("at_once", "remat", "weights"),
    [
        pytest.param(None, False, None, marks=pytest.mark.slow),
        (2, True, None),
        pytest.param(1, False, (0.3, 0.7), marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_value_gradient_and_slots_equal_the_loop_written_out(at_once, remat, weights, rng, x64):
    batch = episodes(rng, dtype=np.float64)
    multi_step = None if weights is None else lambda step: jnp.array(weights)
    objective = objective_of(at_once=at_once, remat=remat, multi_step=multi_step)
    params, state = objective.init(jax.random.key(0), batch)
    stats = state["per_step"]["model"]["stats"]
    assert {name: leaf.shape for name, leaf in stats.items()} == {"mean": (3, 5), "square": (3, 5), "seen": (3,)}
    mean, square = rng.normal(size=(3, 5)), 9 + rng.random((3, 5))  # slots that differ
    state["per_step"]["model"]["stats"] |= {"mean": jnp.asarray(mean), "square": jnp.asarray(square)}
    slots = list(zip(mean, square, strict=True))

    def loss(params):
        value, new, _ = objective(params, state, batch, jt.Context(key=jax.random.key(0)))
        return value, new

    (value, new), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    by_hand = jax.jit(jax.value_and_grad(lambda p: written_out(p, slots, batch, True, weights), has_aux=True))
    (expected, moved), exact = by_hand(params["model"])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    chex.assert_trees_all_close(gradient["model"], exact, rtol=1e-8, atol=1e-12)
    after = new["per_step"]["model"]["stats"]
    np.testing.assert_allclose(after["mean"], [m for m, _ in moved], rtol=1e-10)
    np.testing.assert_allclose(after["square"], [s for _, s in moved], rtol=1e-10)
    np.testing.assert_array_equal(after["seen"], [1, 1, 1])
    chex.assert_trees_all_equal(new["model"], state["model"])

    at_rest = jt.Context(key=None, train=False)
    value, kept, _ = jax.jit(lambda p: objective(p, state, batch, at_rest))(params)
    expected, _ = jax.jit(lambda p: written_out(p, slots, batch, False, weights))(params["model"])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    chex.assert_trees_all_equal(kept, state)


@pytest.mark.slow
def test_tasks_split_over_devices_move_the_same_slots(rng):
    batch, optimizer = episodes(rng, tasks=8), optax.sgd(0.1)

    def run(**kwargs):
        objective = objective_of()
        state = jt.init(objective, optimizer, jax.random.key(0), batch)
        step = jt.train_step(objective, optimizer, **kwargs)
        for _ in range(2):
            state, metrics = step(state, batch)
        return jax.device_get((state.params, state.state, metrics))

    one, mesh = run(), jax.make_mesh((4,), ("tasks",), devices=jax.devices()[:4])
    np.testing.assert_array_equal(one[1]["per_step"]["model"]["stats"]["seen"], [2, 2, 2])
    for four in (run(mesh=mesh), run(mesh=mesh, mode="pmap")):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
            assert a.dtype == b.dtype
            assert np.max(np.abs(a - b)) <= 1e-5 * max(np.max(np.abs(a)), 1e-2)


def probe(params, rng):
    """No loss; its metrics are random projections of the parameters it is called with: on the query set, adapted."""
    directions = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params) for _ in range(4)]

    def loss(outputs, params, state, batch, ctx):
        def along(direction):
            return sum(jnp.vdot(p, d) for p, d in zip(*map(jax.tree.leaves, (params, direction)), strict=True))

        metrics = {f"probe{i}": Mean(along(d), jnp.ones(())) for i, d in enumerate(directions)}
        return jnp.zeros(()), state, metrics

    return jt.Objective("probe", (), loss)


@pytest.mark.parametrize("statistics", [pytest.param("transductive", marks=pytest.mark.slow), "running", "per_step"])
def test_the_query_set_never_reaches_the_adaptation(statistics, rng):
    """Other query images leave the adapted parameters and the support set's statistics as they are, to the bit."""
    batch, task = episodes(rng), jt.classification(model())
    params, _ = task.init(jax.random.key(0), jax.tree.map(lambda x: x[0], batch["support"]))
    choice = getattr(jt.meta, statistics)
    objective = jt.maml(task + probe(params, rng), inner=optax.sgd(RATE), steps=STEPS, statistics=choice)
    params, state = objective.init(jax.random.key(0), batch)
    other = {**batch, "query": {**batch["query"], "image": 3 * batch["query"]["image"] + 1}}
    shifted = {**batch, "support": {**batch["support"], "image": 3 * batch["support"]["image"] + 1}}

    for train in (True, False):
        ctx = jt.Context(key=None, train=train)
        f = jax.jit(lambda batch: objective(params, state, batch, ctx))  # noqa: B023
        (loss, new, metrics), (other_loss, other_new, other_metrics) = f(batch), f(other)
        assert float(loss) != float(other_loss)
        probes = [name for name in metrics if name.startswith("probe")]
        assert len(probes) == 4
        assert all(float(metrics[name].total) == float(other_metrics[name].total) for name in probes)
        assert all(float(metrics[name].total) != float(f(shifted)[2][name].total) for name in probes)
        if statistics == "per_step":
            slots, others = (s["per_step"]["model"]["stats"]["mean"] for s in (new, other_new))
            np.testing.assert_array_equal(slots[:STEPS], others[:STEPS])
            assert np.any(slots[STEPS] != others[STEPS]) == train
        else:
            chex.assert_trees_all_equal(new, state)


@pytest.mark.parametrize(("statistics", "train", "meet"), [
    ("transductive", True, True), ("transductive", False, True), ("running", True, False), ("running", False, False),
    ("per_step", True, True), ("per_step", False, False),
])  # fmt: skip
def test_query_predictions_depend_on_each_other_only_where_said(statistics, train, meet, rng):
    batch = episodes(rng)
    mask = np.zeros((TASKS, 9), np.float32)
    mask[:, 0] = 1
    objective = objective_of(statistics=getattr(jt.meta, statistics))
    params, state = objective.init(jax.random.key(0), batch)
    ctx = jt.Context(key=None, train=train)

    @jax.jit
    def first_example(image):
        query = {**batch["query"], "image": image, "mask": mask}
        return objective(params, state, {**batch, "query": query}, ctx)[0]

    image = batch["query"]["image"].copy()
    before = float(first_example(image))
    image[:, 1:] = 5.0
    assert (before != float(first_example(image))) == meet


def test_a_sum_keeps_the_ordinary_statistics_apart(rng):
    batch = {**episodes(rng), "plain": {k: v[:, 0] for k, v in episodes(rng)["query"].items()}}
    shared = model()
    task = jt.classification(shared)
    objective = jt.maml(task, inner=optax.sgd(RATE), steps=STEPS, statistics=jt.meta.per_step) + task.on("plain")
    state = jt.init(objective, optax.sgd(0.1), jax.random.key(0), batch)
    before = np.array(state.params["model"]["body"])
    after, _ = jt.train_step(objective, optax.sgd(0.1))(state, batch)
    ordinary = after.state["model"]["stats"]["mean"]
    expected = (1 - KEEP) * np.mean(batch["plain"]["image"] @ before, axis=0)
    np.testing.assert_allclose(ordinary, expected, rtol=1e-4, atol=1e-6)
    assert after.state["per_step"]["model"]["stats"]["mean"].shape == (STEPS + 1, 5)


def test_slots_of_another_number_of_steps_are_one_clear_error(rng):
    batch = episodes(rng)
    params, state = objective_of(steps=5).init(jax.random.key(0), batch)
    with pytest.raises(jt.InputError, match=r"of 2 steps have leaves \[3, ...\]; got \(6"):
        objective_of()(params, state, batch, jt.Context())


@pytest.mark.parametrize("more", [2, pytest.param(-1, marks=pytest.mark.slow)])
def test_further_steps_take_the_last_slot_and_rate(more, rng, x64):
    """As many steps evaluated by hand, with statistics and rates of the steps that there are."""
    batch = episodes(rng, dtype=np.float64)
    rates = jt.meta.per_layer_and_step(RATE)
    trained = objective_of(inner=optax.sgd(1.0), rates=rates, multi_step=lambda step: jnp.array([0.5, 0.5]))
    params, state = trained.init(jax.random.key(0), batch)
    mean, square = jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(9 + rng.random((3, 5)))
    state["per_step"]["model"]["stats"] |= {"mean": mean, "square": square}
    body, head = np.array([0.3, 0.2]), np.array([0.1, 0.5])
    params["rates"] = {"model": {"body": jnp.asarray(body), "head": jnp.asarray(head)}}

    def by_hand(own, support, query):
        for step in range(STEPS + more):
            slot, last = min(step, STEPS), min(step, STEPS - 1)
            gradient = jax.grad(lambda p, s=slot: task_loss(p, support, (mean[s], square[s]))[0])(own)
            own = {name: own[name] - rate[last] * gradient[name] for name, rate in (("body", body), ("head", head))}
        end = min(STEPS + more, STEPS)
        return task_loss(own, query, (mean[end], square[end]))[0]

    longer = objective_of(inner=optax.sgd(1.0), rates=rates, steps=STEPS + more)
    at_rest = jt.Context(key=None, train=False)
    value = jax.jit(lambda p: longer(p, state, batch, at_rest)[0])(params)
    expected = jax.jit(jax.vmap(lambda s, q: by_hand(params["model"], s, q)))(batch["support"], batch["query"])
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-10)


def test_training_takes_as_many_steps_as_were_learned(rng):
    batch = episodes(rng)
    params, state = objective_of(rates=jt.meta.per_layer_and_step(RATE)).init(jax.random.key(0), batch)
    ctx = jt.Context(key=jax.random.key(0))
    longer = objective_of(rates=jt.meta.per_layer_and_step(RATE), steps=5, statistics=jt.meta.running)
    with pytest.raises(jt.InputError, match="the rates of 5 inner steps, got those of 2"):
        longer(params, state, batch, ctx)
    with pytest.raises(jt.InputError, match=r"per_step statistics of 5 steps have leaves \[6, ...\]"):
        objective_of(steps=5)(params, state, batch, ctx)
    with pytest.raises(jt.InputError, match=r"the weights \[5\] of 5 steps; got \(2,\)"):
        objective_of(steps=5, multi_step=lambda step: jnp.ones(2))(params, state, batch, ctx)
