"""`balance`: gradients of tasks mixed by a rule, against NumPy in float64 and SciPy, wherever they are computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import jaxtransfer as jt
from jaxtransfer.objective import named_key
from jaxtransfer.train.fingerprint import of_program

KEY = jax.random.key(5)
D, H, C = 6, 4, 3
SHARED = "net/body"


def two_headed(calls=None):
    def init(key, x):
        keys = jax.random.split(key, 3)
        shapes = {"body": (D, H), "left": (H, C), "right": (H, C)}
        return {"params": {name: jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}}

    def apply(variables, x, *, train, key):
        if calls is not None:
            calls.append(x.shape[0])
        params = variables["params"]
        h = jnp.tanh(x @ params["body"])
        return {"left": h @ params["left"], "right": h @ params["right"]}, {}

    return jt.Model(init, apply, "net")


def tasks_of(net):
    """Two domains with rows and masks of their own, and a pull towards 0 with a weight."""
    left, right = (jt.classification(net, output=name).on(name) for name in ("left", "right"))
    return jt.together(left + right) + 0.3 * jt.l2(only=SHARED)


def a_batch(seed=0):
    """The domains disagree: the same images in part, other labels."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, D)).astype(np.float32)

    def part(rows):
        mask = np.float32(rng.integers(0, 2, rows) + np.arange(rows) % 2)
        return {"image": x[:rows], "label": rng.integers(0, C, rows), "mask": mask}

    return {"left": part(8), "right": part(4)}


def by_hand(params, batch):
    """Values and gradients of the three tasks in double precision: of the shared body, and of the heads."""
    body = np.float64(params["net"]["body"])
    values, shared, heads = [], [], {}
    for name in ("left", "right"):
        x, head, part = np.float64(batch[name]["image"]), np.float64(params["net"][name]), batch[name]
        h = np.tanh(x @ body)
        p = np.exp(h @ head)
        p /= p.sum(1, keepdims=True)
        weights = part["mask"] / part["mask"].sum()
        rows = np.arange(len(x))
        values.append(-(weights * np.log(p[rows, part["label"]])).sum())
        p[rows, part["label"]] -= 1
        error = weights[:, None] * p
        heads[name] = h.T @ error
        shared.append(x.T @ ((error @ head.T) * (1 - h**2)))
    values.append(0.3 * 0.5 * (body**2).sum())
    return np.array(values), np.stack([*shared, 0.3 * body]), heads


def surgery(gradients, step=0):
    """PCGrad by the gradients themselves, with the orders that its documentation tells."""
    keys = jax.random.split(named_key(jax.random.fold_in(KEY, step), "balance"), len(gradients))
    total, conflicts = 0.0, 0
    for task, own in enumerate(gradients):
        for other in np.asarray(jax.random.permutation(keys[task], len(gradients))):
            if other != task and (own * gradients[other]).sum() < 0:
                product = (own * gradients[other]).sum() / (gradients[other] ** 2).sum()
                own, conflicts = own - product * gradients[other], conflicts + 1
        total = total + own
    assert conflicts >= 3
    return total


def shortest(gradients, step=0):
    """The minimum-norm mixture, by SciPy."""
    rows = gradients.reshape(len(gradients), -1)
    found = scipy.optimize.minimize(
        lambda a: ((a @ rows) ** 2).sum(),
        np.full(len(rows), 1 / len(rows)),
        jac=lambda a: 2 * rows @ (rows.T @ a),
        bounds=[(0, 1)] * len(rows),
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    return np.tensordot(found.x, gradients, 1)


RULES = {"pcgrad": (jt.multitask.pcgrad, surgery), "mgda": (jt.multitask.mgda, shortest)}


def updated(objective, batches, optimizer=None, **place):
    """Parameters before and after a step on each of the batches, the last state and metrics."""
    optimizer = optimizer or optax.sgd(1.0)
    state = jt.init(objective, optimizer, KEY, batches[0])
    before = jax.tree.map(np.array, state.params)
    step = jt.train_step(objective, optimizer, **place)
    for batch in batches:
        state, metrics = step(state, batch)
    return before, jax.tree.map(np.array, state.params), state, metrics


@pytest.mark.parametrize("name", ["pcgrad", pytest.param("mgda", marks=pytest.mark.slow)])
def test_the_gradient_is_the_mixed_one_on_any_devices(name, mesh_of):
    rule, reference = RULES[name]
    calls, batch = [], a_batch()
    plain = tasks_of(two_headed(calls))
    objective = jt.balance(plain, rule, shared=SHARED)
    for place in ({}, {"mesh": mesh_of(4)}, {"mesh": mesh_of(4), "mode": "pmap"}):
        calls.clear()
        before, after, _, metrics = updated(objective, [batch], **place)
        assert calls == [12, 3 if "mode" in place else 12]  # once at init for its shapes, once in the step
        values, shared, heads = by_hand(before, batch)
        want = reference(shared)
        assert np.abs(want - shared.sum(0)).max() > 0.03  # it is another direction
        np.testing.assert_allclose(
            before["net"]["body"] - after["net"]["body"], want, atol=1e-5 * np.abs(want).max(), err_msg=str(place)
        )
        for head, gradient in heads.items():  # no task but one reads them
            moved = before["net"][head] - after["net"][head]
            np.testing.assert_allclose(moved, gradient, atol=1e-5 * np.abs(gradient).max())
        assert float(metrics["loss"]) == pytest.approx(values.sum(), rel=1e-5)
        assert float(metrics["left/classification"]) == pytest.approx(values[0], rel=1e-5)
        assert float(metrics["l2"]) == pytest.approx(values[2] / 0.3, rel=1e-5)
        told = [float(metrics[f"balance/{task}"]) for task in ("left/classification", "right/classification", "l2")]
        np.testing.assert_allclose(np.tensordot(told, shared, 1), want, atol=1e-4 * np.abs(want).max())


def equal(gram, values, key, state):
    return jnp.ones(len(gram)), state


class Memory:
    """Weighs by the values of the update before: a rule that remembers."""

    def init(self, count):
        return {"values": jnp.ones(count), "updates": jnp.zeros((), jnp.int32)}

    def __call__(self, gram, values, key, state):
        return state["values"], {"values": values, "updates": state["updates"] + 1}


def test_a_rule_that_remembers_and_accumulation():
    objective = jt.balance(tasks_of(two_headed()), Memory(), shared=SHARED)
    batches = [a_batch(seed) for seed in range(4)]
    slow = optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
    before, after, state, _ = updated(objective, batches, slow)
    params, memory = {"net": {name: np.float64(leaf) for name, leaf in before["net"].items()}}, np.ones(3)
    for pair in (batches[:2], batches[2:]):
        total = dict.fromkeys(params["net"], 0.0)
        for batch in pair:
            values, shared, heads = by_hand(params, batch)
            for name, gradient in {"body": np.tensordot(memory, shared, 1), **heads}.items():
                total[name] = total[name] + gradient / 2
        memory = values
        params = {"net": {name: leaf - 0.5 * total[name] for name, leaf in params["net"].items()}}
    for name, leaf in params["net"].items():
        np.testing.assert_allclose(after["net"][name], leaf, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.state["balance"]["values"], memory, rtol=1e-5)
    assert int(state.state["balance"]["updates"]) == 2  # once per update


@pytest.mark.slow
def test_what_is_frozen_is_no_part_of_a_conflict():
    """Neither what never moves nor what doesn't yet: the left head trains at once, the right one after an update."""
    optimizer = jt.optim.gradual_unfreeze(optax.sgd(0.0), ["net/body", "net/right", "net/left"], every=1)
    objective = jt.balance(tasks_of(two_headed()), lambda gram, *_: (jnp.diagonal(gram), {}))
    batch = a_batch()
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    _, shared, heads = by_hand(jax.tree.map(np.array, state.params), batch)
    left, right = ((heads[name] ** 2).sum() for name in ("left", "right"))
    bodies = (shared**2).sum((1, 2))
    for want in ((left, 0, 0), (left, right, 0), (left + bodies[0], right + bodies[1], bodies[2])):
        state, metrics = step(state, batch)
        got = [metrics[name] for name in ("balance/left/classification", "balance/right/classification", "balance/l2")]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_resumes_with_what_the_rule_remembers(tmp_path):
    objective, batches = jt.balance(tasks_of(two_headed()), Memory(), shared=SHARED), [a_batch(s) for s in range(6)]

    def run(out, steps):
        return jt.fit(objective, optax.adam(0.1), batches, steps=steps, out=out, save_every=1, progress=False)

    run(tmp_path / "cut", 3)
    resumed, whole = run(tmp_path / "cut", 6), run(tmp_path / "whole", 6)
    for got, want in zip(jax.tree.leaves(resumed.state[2:]), jax.tree.leaves(whole.state[2:]), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(resumed.state.state["balance"]["updates"]) == 6
    assert "train/balance/l2" in whole.history[-1]


def gradient_of(objective, batch, ctx=None):
    params, state = objective.init(KEY, batch)
    ctx = ctx or jt.Context(key=KEY)
    return params, jax.jit(jax.value_and_grad(lambda p: objective(p, state, batch, ctx)[0]))(params)


def close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_it_is_a_sum_of_its_terms():
    net, batch = two_headed(), a_batch()
    plain = tasks_of(net)
    objective = jt.balance(plain, jt.multitask.mgda, shared=SHARED)
    extra = jt.classification(net, output="right").on("left").named("extra")
    params, (value, gradient) = gradient_of(2 * objective + 0.5 * extra, batch)
    _, shared, heads = by_hand(params, batch)
    _, (_, more) = gradient_of(0.5 * extra, batch)
    want = 2 * shortest(shared) + np.asarray(more["net"]["body"])
    np.testing.assert_allclose(gradient["net"]["body"], want, atol=2e-5)
    np.testing.assert_allclose(gradient["net"]["left"], 2 * heads["left"], atol=2e-5)
    _, (total, _) = gradient_of(2 * plain + 0.5 * extra, batch)
    assert float(value) == pytest.approx(float(total), rel=1e-6)
    state = jt.init(objective, optax.sgd(0.1), KEY, batch)
    told = [jt.evaluate(one, state, [batch, a_batch(1)]) for one in (plain, objective)]
    assert told[0] == told[1]
    moved = jt.together(jt.balance(list(objective_parts(net)), jt.multitask.mgda, shared=SHARED)).named("x").on("y")
    _, (_, again) = gradient_of(moved, {"y": batch})
    np.testing.assert_allclose(again["net"]["body"], shortest(shared[:2]), atol=1e-5)


def objective_parts(net):
    return (jt.classification(net, output=name).on(name) for name in ("left", "right"))


@pytest.mark.slow
def test_a_list_has_a_task_each():
    net, batch = two_headed(), a_batch()
    left, right = objective_parts(net)
    decay = 0.3 * jt.l2(only=SHARED)
    objective = jt.balance([left + decay, right], jt.multitask.mgda, shared=SHARED, name="mixed")
    params, (_, gradient) = gradient_of(objective, batch)
    _, shared, _ = by_hand(params, batch)
    pair = np.stack([shared[0] + shared[2], shared[1]])
    np.testing.assert_allclose(gradient["net"]["body"], shortest(pair), atol=1e-5)
    _, _, _, metrics = updated(objective, [batch])
    assert {"mixed/left/classification+l2", "mixed/right/classification"} <= metrics.keys()
    assert str(objective) == "balance(left/classification(net) + 0.3 * l2, right/classification(net), mgda)"
    partly = functools.partial(jt.multitask.pcgrad)
    assert str(0.5 * jt.balance(left + right, partly) - jt.l2()) == (
        "balance(0.5 * left/classification(net), 0.5 * right/classification(net), pcgrad) - l2"
    )
    one = jt.balance([left, jt.l2()], jt.multitask.pcgrad)
    assert str(one + one.on("there").named("there")) == (
        "balance(left/classification(net) + there/there/left/classification(net), l2 + there/there/l2, pcgrad)"
    )
    one = jt.balance(left, jt.multitask.pcgrad)
    close(gradient_of(one, batch)[1], gradient_of(left, batch)[1])


@pytest.mark.slow
def test_equal_weights_are_the_sum_in_a_meta_objective_too():
    """Second derivatives pass through the mixture; in evaluation it still is what an inner loop follows."""
    net, rng = two_headed(), np.random.default_rng(2)
    x = rng.normal(size=(2, 6, D)).astype(np.float32)
    labels = rng.integers(0, C, (2, 2, 6))
    episodes = {
        part: {"image": x + number, "label": labels[number], "other": labels[1 - number]}
        for number, part in enumerate(("support", "query"))
    }
    plain = jt.classification(net, output="left") + jt.classification(net, output="right", label="other").named("b")

    def meta(objective):
        return jt.maml(objective, inner=optax.sgd(0.4), steps=2)

    for train in (True, False):
        ctx = jt.Context(key=KEY if train else None, train=train)
        want, got, other = (
            gradient_of(meta(objective), episodes, ctx)[1]
            for objective in (plain, jt.balance(plain, equal), jt.balance(plain, jt.multitask.mgda))
        )
        close(got, want)
        assert abs(float(other[0]) - float(want[0])) > 1e-3  # the inner loop takes another way


@pytest.mark.slow
def test_frozen_trees_are_read_through_the_context():
    net, batch = two_headed(), a_batch()
    anchor, _ = jt.together(sum(objective_parts(net))).init(jax.random.key(1), batch)
    objective = jt.balance(sum(objective_parts(net)) + jt.l2_sp(anchor), equal)
    (handle,) = objective.frozen
    there = jt.Context(key=KEY, frozen={handle: jax.tree.map(jnp.zeros_like, handle.tree)})
    params, (_, gradient) = gradient_of(objective, batch, there)
    _, (_, want) = gradient_of(sum(objective_parts(net)) + jt.l2(), batch)
    close(gradient, want)
    assert params.keys() == {"net"}


@pytest.mark.slow
def test_what_a_run_is_knows_the_rule():
    batch, net = a_batch(), two_headed()

    def program(rule, shared=SHARED):
        objective = jt.balance(tasks_of(net), rule, shared=shared)
        params, state = objective.init(KEY, batch)
        return of_program(lambda p, b, k: objective(p, state, b, jt.Context(0, k)), params, batch, KEY)

    assert program(jt.multitask.pcgrad) == program(jt.multitask.pcgrad)
    assert program(jt.multitask.pcgrad) != program(jt.multitask.mgda)
    assert program(jt.multitask.mgda) != program(jt.multitask.mgda, ".*")


class Forgetful(Memory):
    """Returns another state than it is given."""

    def __init__(self, **other):
        self.other = other

    def __call__(self, gram, values, key, state):
        return values, {**state, **self.other}


def test_nonsense_is_refused():
    net, batch = two_headed(), a_batch()
    plain = tasks_of(net)
    objective = jt.balance(plain, jt.multitask.pcgrad)
    for terms, rule, told in (
        (objective, jt.multitask.mgda, "balanced already"),
        ([], jt.multitask.mgda, "a list of one or more"),
        ([net], jt.multitask.mgda, "a list of one or more"),
        (plain, "pcgrad", "a rule is a function"),
    ):
        with pytest.raises(jt.InputError, match=told):
            jt.balance(terms, rule)
    for wrong, told in (
        (jt.balance(plain, jt.multitask.mgda, shared="bdoy"), "shared: the pattern 'bdoy' selects no parameter"),
        (jt.balance(plain, lambda *seen: (jnp.ones(2), {})), "one weight for each of the 3 tasks"),
        (jt.balance(plain, Forgetful(updates=0.5)), r"'updates': 'int32 \(\)'.*; got .*'updates': 'float32 \(\)'"),
        (jt.balance(plain, Forgetful(more=1)), "a state of the structure, shapes and types"),
        (objective.terms[0][1], "1 of the 3 tasks that jt.balance weighs against each other stand alone"),
        (objective + jt.l2().named("balance/l2"), "the metric 'balance/l2'; call one of them otherwise"),
    ):
        with pytest.raises(jt.InputError, match=told):
            gradient_of(wrong, batch)
