"""Moving averages and what else moves once per update: their precision, under accumulation, in a second run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(7)
B, D = 4, 6


def network(dtype=jnp.float32):
    """An encoder of two matrices with all outputs that the objectives read."""

    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (D, 3), dtype), "v": jnp.eye(3, dtype=dtype) + dtype(0.5)}}

    def apply(variables, x, *, train, key):
        params = variables["params"]
        z = x.astype(dtype) @ params["w"]
        return {"projection": z, "prediction": z @ params["v"], "logits": z}, {}

    return jt.Model(init, apply, name="net")


def a_batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, D)).astype(np.float32)
    return {"image": x, "image2": x[:, ::-1].copy(), "label": rng.integers(0, 3, B)}


def accumulated(optimizer, count):
    return optax.MultiSteps(optimizer, count).gradient_transformation()


def trained(objective, optimizer, batches, **start):
    """The states after each of the batches."""
    state, step, seen = jt.init(objective, optimizer, KEY, batches[0], **start), jt.train_step(objective, optimizer), []
    seen.append(jax.tree.map(np.array, (state.params, state.state)))
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(jax.tree.map(np.array, (state.params, state.state)))
    return state, seen, metrics


@pytest.mark.parametrize(
    ("dtype", "decay"), [(jnp.bfloat16, 0.999), pytest.param(jnp.float16, 0.9999, marks=pytest.mark.slow)]
)
def test_an_average_of_half_precision_moves_as_its_recursion(dtype, decay):
    objective = jt.byol(network(dtype), decay=decay)
    _, seen, _ = trained(objective, jt.optim.master_weights(optax.sgd(0.3)), [a_batch()] * 40)
    slow = first = np.float64(seen[0][0]["net"]["w"])
    for params, _ in seen[1:-1]:  # it moves at the start of a step
        slow = decay * slow + (1 - decay) * np.float64(params["net"]["w"])
    got = seen[-1][1]["net_ema"]["params"]["w"]
    assert got.dtype == np.float32
    assert np.abs(slow - first).mean() > 2e-5
    np.testing.assert_allclose(got - first, slow - first, rtol=1e-2, atol=1e-7)


def test_an_averaged_model_runs_in_its_own_type():
    net = network(dtype := jnp.bfloat16)
    objective = jt.classification(net) + jt.classification(jt.ema(net)).named("slow")
    params, state = objective.init(KEY, a_batch())
    outputs, _ = objective.run(params, state, a_batch(), jt.Context(key=KEY))
    assert [out["logits"].dtype for out in outputs.values()] == [dtype, dtype]
    assert {leaf.dtype for leaf in jax.tree.leaves(state["net_ema"])} == {jnp.dtype(jnp.float32)}


FOLLOWING = {
    "byol": lambda net: jt.byol(net, decay=0.9),
    "moco": lambda net: jt.moco(net, queue=9, decay=0.9),
    "dino": lambda net: jt.dino(net, decay=0.9, teacher_temperature=lambda step: 0.2 - 0.01 * step),
    "mean teacher": lambda net: jt.classification(net) + 3.0 * jt.mean_teacher(net, decay=0.9),
    "nnclr": lambda net: jt.nnclr(net, queue=9),
    "a schedule": lambda net: jt.classification(net) + (lambda step: 0.1 * step) * jt.l2(),
}
ALIKE = {"nnclr", "dino", "a schedule"}
ACCUMULATED = {
    "byol": lambda: accumulated(optax.sgd(0.3), 3),
    "moco": lambda: accumulated(optax.sgd(0.3), 3),
    "dino": lambda: optax.chain(optax.identity(), accumulated(optax.sgd(0.3), 3)),
    "mean teacher": lambda: jt.optim.by_path({".*": accumulated(optax.sgd(0.3), lambda step: 3)}),
    "nnclr": lambda: optax.MultiSteps(optax.sgd(0.3), 3),
    "a schedule": lambda: accumulated(optax.sgd(0.3), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in FOLLOWING])
def test_three_batches_that_make_one_update_are_one_step(name):
    """The same batch three times has the gradient of that batch: weights, averages and queues are those of one step."""
    objective, batches = FOLLOWING[name](network()), [a_batch(n) for n in range(4)]
    _, one, value = trained(objective, optax.sgd(0.3), batches)
    _, many, again = trained(objective, ACCUMULATED[name](), [batch for batch in batches for _ in range(3)])
    for number in range(len(batches) + 1):
        for path, leaf in jt.tree.leaves_by_path(one[number]).items():
            got = jt.tree.leaves_by_path(many[3 * number])[path]
            np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-5, err_msg=f"{path} after {number} updates")
    assert float(again["loss"]) == pytest.approx(float(value["loss"]), rel=1e-4)
    moved = np.abs(one[-1][0]["net"]["w"] - one[0][0]["net"]["w"]).max()
    assert moved > 1e-2  # what stands still would agree as well


def test_queues_and_averages_stay_until_the_update_is_made():
    objective, batches = jt.moco(network(), queue=9, decay=0.9), [a_batch(n) for n in range(4)]
    _, seen, _ = trained(objective, accumulated(optax.sgd(0.3), 2), batches)
    places = [int(state["net_queue"]["place"]) for _, state in seen]
    assert places == [0, 0, 4, 4, 8]
    averages = [state["net_ema"]["params"]["w"] for _, state in seen]
    assert np.array_equal(averages[2], averages[3])
    np.testing.assert_allclose(averages[4], 0.9 * averages[3] + 0.1 * seen[3][0]["net"]["w"], rtol=1e-5)
    assert np.any(averages[4] != averages[3])


@pytest.mark.slow
def test_a_batch_that_is_skipped_makes_no_update():
    rejecting = optax.MultiSteps(optax.sgd(0.3), 1, should_skip_update_fn=optax.skip_not_finite)
    objective = jt.byol(network(), decay=0.5)
    broken = {name: np.full_like(value, np.nan) for name, value in a_batch().items() if name != "label"}
    _, seen, _ = trained(objective, rejecting.gradient_transformation(), [a_batch(), broken, broken, a_batch()])
    _, plain, _ = trained(objective, optax.sgd(0.3), [a_batch(), a_batch()])
    for got, expected in zip(jax.tree.leaves(seen[-1]), jax.tree.leaves(plain[-1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_an_accumulation_inside_another_counts_what_both_have_made():
    optimizer = accumulated(accumulated(optax.sgd(1.0), 2), 2)
    objective = jt.classification(network()) + (lambda step: step) * jt.l2()
    _, seen, _ = trained(objective, optimizer, [a_batch()] * 8)
    _, plain, _ = trained(objective, optax.sgd(1.0), [a_batch()] * 2)
    np.testing.assert_allclose(seen[-1][0]["net"]["w"], plain[-1][0]["net"]["w"], rtol=1e-4)


def test_evaluation_counts_updates_too():
    objective, optimizer = (lambda step: 1.0 + step) * jt.l2(), accumulated(optax.sgd(0.0), 2)
    objective = objective + 0 * jt.classification(network())
    state, _, metrics = trained(objective, optimizer, [a_batch()] * 5)
    value = jt.evaluate(objective, state, [a_batch()])["loss"]
    assert value == pytest.approx(3 * float(metrics["l2"]), rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(value, rel=1e-5)


def test_draws_differ_among_the_batches_of_an_update():
    def init(key, x):
        return {"params": {"w": jnp.ones(())}}

    def apply(variables, x, *, train, key):
        return {"logits": variables["params"]["w"] * jax.random.normal(key, (len(x), 3))}, {}

    objective, optimizer = jt.classification(jt.Model(init, apply, name="net")), accumulated(optax.sgd(0.0), 4)
    state, step, seen = jt.init(objective, optimizer, KEY, a_batch()), jt.train_step(objective, optimizer), set()
    for _ in range(8):
        state, metrics = step(state, a_batch())
        seen.add(float(metrics["loss"]))
    assert len(seen) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byol", "moco", "mean teacher"])
def test_a_second_run_keeps_the_average_that_it_is_given(name):
    objective = FOLLOWING[name](network())
    first = jt.fit(objective, optax.sgd(0.3), [a_batch()] * 12, steps=12, progress=False).state
    fast, slow = first.params["net"]["w"], first.state["net_ema"]["params"]["w"]
    assert np.abs(fast - slow).max() > 1e-2
    second, _, _ = trained(objective, optax.sgd(0.0), [a_batch()] * 3, params=first.params, state=first.state)
    expected = np.float64(slow)
    for number in (1, 2):  # none at the start; a mean teacher goes on with its warm-up where it was
        decay = min(1 - 1 / (11 + number + 1), 0.9) if name == "mean teacher" else 0.9
        expected = decay * expected + (1 - decay) * np.float64(fast)
    np.testing.assert_allclose(second.state["net_ema"]["params"]["w"], expected, rtol=1e-4, atol=1e-6)


def test_an_average_that_is_given_alone_is_past_its_warm_up():
    objective = jt.mean_teacher(network(), decay=0.75)
    start = jt.init(objective, optax.sgd(0.0), KEY, a_batch())
    given = {"net_ema": jax.tree.map(lambda w: w + 1, start.state["net_ema"])}
    state, _, _ = trained(objective, optax.sgd(0.0), [a_batch()] * 3, state=given)
    gap = np.asarray(state.state["net_ema"]["params"]["w"]) - state.params["net"]["w"]
    np.testing.assert_allclose(gap, 0.75**2, rtol=1e-4)


def test_an_average_that_is_not_given_starts_as_the_model_does():
    net = network()
    objective, given = jt.byol(net), {"net": jax.tree.map(lambda w: w + 2, net.init(KEY, a_batch()["image"])["params"])}
    _, seen, _ = trained(objective, optax.sgd(0.3), [a_batch()], params=given)
    for _, state in seen:
        for got, expected in zip(*map(jax.tree.leaves, (state["net_ema"]["params"], given["net"])), strict=True):
            np.testing.assert_array_equal(got, expected)
    objective = jt.moco(net, queue=9)
    queue = {"net_queue": {"keys": np.full((9, 3), 0.5, np.float32), "place": np.int32(4)}}
    state = jt.init(objective, optax.sgd(0.1), KEY, a_batch(), params=given, state=queue)
    np.testing.assert_array_equal(state.state["net_queue"]["keys"], queue["net_queue"]["keys"])
    np.testing.assert_array_equal(state.state["net_ema"]["params"]["w"], given["net"]["w"])
