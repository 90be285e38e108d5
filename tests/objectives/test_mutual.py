"""Moving averages, mean teachers and mutual learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints

KEY = jax.random.key(5)


def a_batch(seed=0, rows=16):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(rows, 4, 4, 1)).astype(np.float32),
        "label": rng.integers(0, 3, rows).astype(np.int32),
    }


def student(name="student"):
    return jt.models.mlp(3, hidden=(6,), name=name)


def steps(objective, count, batch, params=None):
    optimizer = optax.sgd(0.5)
    state = jt.init(objective, optimizer, KEY, batch, params=params)
    step, seen = jt.train_step(objective, optimizer), [jax.tree.map(np.array, state.params)]
    for _ in range(count):
        state, metrics = step(state, batch)
        seen.append(jax.tree.map(np.array, state.params))
    return state, seen, metrics


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.6, lambda step: 1 - 1 / (step + 1)])
def test_the_average_is_its_recursion(decay):
    model, batch = student(), a_batch()
    average = jt.ema(model, decay)
    objective = jt.classification(model) + jt.distillation(model, average)
    given = jax.tree.map(lambda w: w + 1.0, objective.init(KEY, batch)[0])
    state, seen, _ = steps(objective, 4, batch, params=given)
    rate = decay if callable(decay) else lambda step: decay
    expected = seen[0]["student"]  # at the first step the average is the model, whatever weights it started from
    for number in (1, 2, 3):
        expected = jax.tree.map(
            lambda e, w, n=number: rate(n) * e + (1 - rate(n)) * w, expected, seen[number]["student"]
        )
    got = state.state["student_ema"]["params"]
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_its_targets_are_its_own_and_pass_no_gradient():
    model, batch = student(), a_batch()
    objective = jt.distillation(model, jt.ema(model, 0.5), temperature=2.0)
    params, state = objective.init(KEY, batch)
    params = {"student": jax.tree.map(lambda w: w + 0.3, params["student"])}
    state["student_ema"]["params"] = jax.tree.map(lambda w: w - 0.4, params["student"])
    old = state["student_ema"]["params"]
    teacher = jax.tree.map(lambda e, w: 0.5 * e + 0.5 * w, old, params["student"])
    fixed = jt.distillation(model, jt.frozen(student("teacher"), {"params": teacher}), temperature=2.0)
    ctx = jt.Context(step=jnp.asarray(3), key=KEY)
    got = jax.jit(jax.value_and_grad(lambda p: objective(p, state, batch, ctx)[0]))(params)
    expected = jax.jit(jax.value_and_grad(lambda p: fixed(p, {"student": {}}, batch, ctx)[0]))(params)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_batch_statistics_are_its_own():
    model, batch = jt.models.small_cnn(3, width=4, name="student"), a_batch()
    objective = jt.classification(model) + jt.mean_teacher(model, decay=0.9)
    params, state = objective.init(KEY, batch)
    start = state["student_ema"]["batch_stats"]
    ctx = jt.Context(step=jnp.asarray(2), key=KEY)
    shifted = {"student": jax.tree.map(lambda w: 1.5 * w, params["student"])}
    _, after, _ = objective(shifted, state, batch, ctx)
    own, model_s = (jax.tree.leaves(after[name]["batch_stats"]) for name in ("student_ema", "student"))
    assert any(np.any(a != b) for a, b in zip(own, jax.tree.leaves(start), strict=True))
    assert any(np.any(a != b) for a, b in zip(own, model_s, strict=True))
    _, same, _ = objective(shifted, state, batch, jt.Context(step=jnp.asarray(2), train=False))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), same["student_ema"], state["student_ema"]))


@pytest.mark.slow
def test_the_average_is_saved_and_restored(tmp_path):
    model = student()
    objective = jt.classification(model) + jt.mean_teacher(model, decay=0.9)
    arguments = {"key": 0, "progress": False}
    whole = jt.fit(objective, optax.sgd(0.1), [a_batch(i) for i in range(6)], steps=6, **arguments)

    class Stop(Exception):
        pass

    def broken():
        for number in range(6):
            if number == 5:
                raise Stop
            yield a_batch(number)

    with pytest.raises(Stop):
        jt.fit(objective, optax.sgd(0.1), broken(), steps=6, save_every=3, out=tmp_path, **arguments)
    assert checkpoints.steps(tmp_path / "checkpoints") == [3]
    batches = [a_batch(i) for i in range(6)]
    resumed = jt.fit(objective, optax.sgd(0.1), batches, steps=6, save_every=3, out=tmp_path, **arguments)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), whole.state.state, resumed.state.state))


def test_an_average_of_what_does_not_train_is_refused():
    objective = jt.classification(jt.ema(student()))
    with pytest.raises(jt.InputError, match="is a moving average of model 'student', which nothing here trains"):
        objective.init(KEY, a_batch())
    for decay in (-0.1, 1.1):
        with pytest.raises(jt.InputError, match="decay of a moving average"):
            jt.ema(student(), decay)
        with pytest.raises(jt.InputError, match="decay of a moving average"):
            jt.mean_teacher(student(), decay=decay)
    model = student()
    terms = [jt.distillation(model, jt.ema(model, 0.9)).named(name) for name in "ab"]
    with pytest.raises(jt.InputError, match="two different models are named 'student_ema'"):
        terms[0] + terms[1]


def test_another_view_for_the_teacher():
    model, batch = student(), a_batch()
    batch["image2"] = a_batch(1)["image"]
    objective = jt.mean_teacher(model, decay=0.5, teacher_view="image2")
    params, state = objective.init(KEY, batch)
    loss = jax.jit(lambda params: objective(params, state, batch, jt.Context(key=KEY))[0])(params)
    one, two = (
        jax.nn.softmax(model.apply({"params": params["student"]}, batch[view], train=True, key=None)[0]["logits"])
        for view in ("image", "image2")
    )
    np.testing.assert_allclose(loss, np.mean((one - two) ** 2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_mutual_learning_is_its_formula(count):
    models, batch = [student(name) for name in "abc"[:count]], a_batch()
    objective = jt.mutual_learning(models, temperature=2.0, weight=0.7)
    params, state = objective.init(KEY, batch)
    ctx = jt.Context(key=KEY)
    loss, _, metrics = jax.jit(lambda params: objective(params, state, batch, ctx))(params)
    z = {n: np.float64(m.apply({"params": params[n]}, batch["image"], train=True, key=None)[0]["logits"]) for n, m in
         zip("abc", models, strict=False)}  # fmt: skip
    logs = {n: v - np.log(np.exp(v).sum(-1, keepdims=True)) for n, v in z.items()}
    soft = {n: v / 2 - np.log(np.exp(v / 2).sum(-1, keepdims=True)) for n, v in z.items()}
    expected = 0.0
    for k in z:
        expected -= np.mean(logs[k][np.arange(16), batch["label"]])
        for j in z:
            if j != k:
                expected += 0.7 / (count - 1) * 4 * np.mean(np.sum(np.exp(soft[j]) * (soft[j] - soft[k]), -1))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert {"a", "b", "a/accuracy", "a/mutual", "b/mutual"} <= set(metrics)
    alone = jt.classification(models[0]).named("a") + 0.7 * jt.distillation(
        models[0],
        [jt.frozen(m.named("t"), {"params": params[n]}) for n, m in zip("bc", models[1:], strict=False)],
        temperature=2.0,
    ).named("a/mutual")
    got = jax.jit(jax.grad(lambda p: objective(p, state, batch, ctx)[0]))(params)["a"]
    expected = jax.jit(jax.grad(lambda p: alone(p, {"a": {}}, batch, ctx)[0]))({"a": params["a"]})["a"]
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_mutual_learning_needs_two_names():
    for models in ([student()], [student(), student()]):
        with pytest.raises(jt.InputError, match="two students or more, of different names"):
            jt.mutual_learning(models)
