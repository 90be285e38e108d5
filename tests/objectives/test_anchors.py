"""Anchor penalties on models: values and gradients against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(2)


def by_path(tree, skip=()):
    """Leaves in double precision by the keys joined with slashes, without those that start with `skip`."""
    out = {}

    def walk(node, path):
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}/{key}" if path else key)
        elif not any(path.startswith(start) for start in skip):
            out[path] = np.asarray(node, np.float64)

    walk(tree, "")
    return out


def images(rng, rows=6, side=4, classes=3):
    return {
        "image": rng.normal(size=(rows, side, side, 1)).astype(np.float32),
        "label": rng.integers(0, classes, rows).astype(np.int32),
    }


def noisy(rng, tree, scale=0.1):
    return jax.tree.map(lambda w: w + jnp.asarray(scale * rng.normal(size=w.shape), w.dtype), tree)


def model_of(kind, classes=3):
    if kind == "mlp":
        return jt.models.mlp(classes, hidden=(5,))
    return jt.models.small_cnn(classes, width=2, dtype=jnp.bfloat16 if kind == "bfloat16" else None)


def penalty_of(objective, params, state, batch):
    """The value and the gradient of a penalty alone, through the objective."""

    def loss(params):
        ctx = jt.Context(step=jnp.int32(0), key=KEY)
        value, _, metrics = objective(params, state, batch, ctx)
        return value, metrics

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), grads, metrics


@pytest.mark.parametrize("kind", ["mlp", "batch norm", "bfloat16"])
@pytest.mark.parametrize("exclude", [(), "head", ("head", "model/stem.*|stage1")])
def test_l2_sp(rng, kind, exclude):
    model, batch = model_of(kind), images(rng)
    params, state = jt.classification(model).init(KEY, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    skip = ["model/head"] if exclude else []
    if len(exclude) == 2:
        skip += ["model/stage1"] if kind == "mlp" else ["model/stem", "model/stage1/"]
        exclude = ("head", "stage1" if kind == "mlp" else "stem_.*")
    anchor = noisy(rng, params)
    value, grads, metrics = penalty_of(jt.l2_sp(anchor, strength=0.3, exclude=exclude), params, state, batch)
    ours, theirs = by_path(params, skip), by_path(anchor, skip)
    expected = 0.3 * 0.5 * sum(((ours[p] - theirs[p]) ** 2).sum() for p in ours)
    assert value == pytest.approx(expected, rel=1e-6)
    assert float(metrics["l2_sp"].value) == pytest.approx(expected, rel=1e-6)
    for path, grad in by_path(grads).items():
        want = 0.3 * (ours[path] - theirs[path]) if path in ours else np.zeros_like(grad)
        np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("kind", ["mlp", "batch norm", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_l2_sp_adds_exactly_its_gradient_to_a_task(rng, kind):
    model, batch = model_of(kind), images(rng)
    task = jt.classification(model)
    params, state = task.init(KEY, batch)
    anchor = {"model": {k: v for k, v in noisy(rng, params)["model"].items() if k != "head"}}
    with_penalty = task + 0.5 * jt.l2_sp(anchor, strength=0.4, exclude="head")
    plain_value, plain, _ = penalty_of(task, params, state, batch)
    value, grads, _ = penalty_of(with_penalty, params, state, batch)
    ours, theirs = by_path(params), by_path(anchor)
    expected = 0.2 * 0.5 * sum(((ours[p] - theirs[p]) ** 2).sum() for p in theirs)
    assert value - plain_value == pytest.approx(expected, rel=1e-4)
    plain, grads = by_path(plain), by_path(grads)
    for path in ours:
        added = 0.2 * (ours[path] - theirs[path]) if path in theirs else 0
        scale = np.abs(plain[path]).max() + 1e-3
        np.testing.assert_allclose(grads[path], plain[path] + added, atol=1e-6 * scale, rtol=1e-5, err_msg=path)


def test_strength_and_anchor_follow_the_arguments(rng):
    model, batch = model_of("mlp"), images(rng)
    params, state = jt.classification(model).init(KEY, batch)
    anchor = noisy(rng, params)
    one = penalty_of(jt.l2_sp(anchor), params, state, batch)[0]
    assert penalty_of(jt.l2_sp(anchor, strength=4.0), params, state, batch)[0] == pytest.approx(4 * one, rel=1e-6)
    assert penalty_of(jt.l2_sp(params), params, state, batch)[0] == 0
    assert penalty_of(jt.l2_sp(params, strength=0.0), params, state, batch)[0] == 0


def test_two_models_and_numpy_anchors(rng):
    batch = {"image": rng.normal(size=(4, 3)).astype(np.float32), "label": np.zeros(4, np.int32)}
    student, other = jt.models.mlp(2, hidden=(3,)).named("student"), jt.models.mlp(2, hidden=()).named("other")
    task = jt.classification(student) + jt.classification(other).named("second")
    params, state = task.init(KEY, batch)
    anchor = jax.tree.map(lambda w: np.asarray(w) + 1.0, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    value, _, _ = penalty_of(jt.l2_sp(anchor), params, state, batch)
    assert value == pytest.approx(count / 2, rel=1e-6)
    value, _, _ = penalty_of(jt.l2_sp({"student": anchor["student"]}, exclude="other"), params, state, batch)
    assert value == pytest.approx(sum(leaf.size for leaf in jax.tree.leaves(params["student"])) / 2, rel=1e-6)


def test_what_is_not_covered_is_listed_at_init(rng):
    model, batch, optimizer = model_of("mlp", classes=3), images(rng), optax.sgd(0.1)
    task = jt.classification(model)
    anchor = {"model": dict(jt.classification(model_of("mlp", classes=5)).init(KEY, batch)[0]["model"])}
    with pytest.raises(jt.InputError, match=r"model/head/bias: .*\(3,\).*\(5,\).*model/head/kernel.*exclude"):
        jt.init(task + jt.l2_sp(anchor), optimizer, KEY, batch)
    jt.init(task + jt.l2_sp(anchor, exclude="head"), optimizer, KEY, batch)
    head = anchor["model"].pop("head")
    with pytest.raises(jt.InputError, match=r"- model/head/bias \(3,\); - model/head/kernel"):
        jt.init(task + jt.l2_sp(anchor), optimizer, KEY, batch)
    anchor["model"]["spare"] = head
    with pytest.raises(jt.InputError, match=r"\+ model/spare/bias \(5,\)"):
        jt.init(task + jt.l2_sp(anchor, exclude="head"), optimizer, KEY, batch)
    with pytest.raises(jt.InputError, match="'haed' selects no parameter"):
        jt.init(task + jt.l2_sp(anchor, exclude="haed"), optimizer, KEY, batch)
    with pytest.raises(jt.InputError, match=r"- model/"):  # weights without the model's name
        jt.init(task + jt.l2_sp(anchor["model"]), optimizer, KEY, batch)


@pytest.mark.parametrize(
    ("only", "selected"),
    [
        (".*", ["model/stage1/kernel", "model/stage1/bias", "model/head/kernel", "model/head/bias"]),
        ("head", ["model/head/kernel", "model/head/bias"]),
        (("head/bias", "stage1"), ["model/stage1/kernel", "model/stage1/bias", "model/head/bias"]),
        (".*kernel", ["model/stage1/kernel", "model/head/kernel"]),
    ],
)
def test_l2_only(rng, only, selected):
    model, batch = model_of("mlp"), images(rng)
    params, state = jt.classification(model).init(KEY, batch)
    params = noisy(rng, params)
    value, grads, metrics = penalty_of(jt.l2(strength=0.7, only=only), params, state, batch)
    ours = by_path(params)
    assert value == pytest.approx(0.35 * sum((ours[p] ** 2).sum() for p in selected), rel=1e-6)
    assert float(metrics["l2"].value) == pytest.approx(value, rel=1e-6)
    for path, grad in by_path(grads).items():
        np.testing.assert_allclose(grad, 0.7 * ours[path] * (path in selected), rtol=1e-6)


def test_l2_of_nothing_is_an_error(rng):
    model, batch = model_of("mlp"), images(rng)
    with pytest.raises(jt.InputError, match="'haed' selects no parameter"):
        jt.init(jt.classification(model) + jt.l2(only="haed"), optax.sgd(0.1), KEY, batch)


@pytest.mark.parametrize("kind", ["mlp", "batch norm", "bfloat16"])
def test_fisher_l2_sp(rng, kind):
    model, batch = model_of(kind), images(rng)
    params, state = jt.classification(model).init(KEY, batch)
    anchor = noisy(rng, params)
    fisher = jax.tree.map(lambda w: jnp.asarray(rng.exponential(size=w.shape), jnp.float32), params)
    objective = jt.fisher_l2_sp(anchor, fisher, strength=0.3, exclude="head")
    value, grads, metrics = penalty_of(objective, params, state, batch)
    ours, theirs, weights = (by_path(tree, ["model/head"]) for tree in (params, anchor, fisher))
    expected = 0.15 * sum((weights[p] * (ours[p] - theirs[p]) ** 2).sum() for p in ours)
    assert value == pytest.approx(expected, rel=1e-6)
    assert float(metrics["fisher_l2_sp"].value) == pytest.approx(expected, rel=1e-6)
    for path, grad in by_path(grads).items():
        want = 0.3 * weights[path] * (ours[path] - theirs[path]) if path in ours else np.zeros_like(grad)
        np.testing.assert_allclose(grad, want, rtol=2e-6, atol=1e-9, err_msg=path)
    ones = jax.tree.map(jnp.ones_like, params)
    plain = penalty_of(jt.l2_sp(anchor, strength=0.3), params, state, batch)[0]
    assert penalty_of(jt.fisher_l2_sp(anchor, ones, strength=0.3), params, state, batch)[0] == pytest.approx(plain)
    del fisher["model"]["head"]
    with pytest.raises(jt.InputError, match="- model/head/bias"):
        jt.init(jt.classification(model) + jt.fisher_l2_sp(anchor, fisher), optax.sgd(0.1), KEY, batch)


def test_training_under_a_strong_anchor_stays_near_it(rng):
    model, batch, optimizer = model_of("mlp"), images(rng), optax.sgd(0.05)
    params, _ = jt.classification(model).init(jax.random.key(9), batch)
    ends = {}
    for strength in (0.0, 10.0):
        objective = jt.classification(model) + jt.l2_sp(params, strength=strength)
        state, step = jt.init(objective, optimizer, KEY, batch, params=params), jt.train_step(objective, optimizer)
        for _ in range(20):
            state, _ = step(state, batch)
        start, end = by_path(params), by_path(state.params)
        ends[strength] = sum(((start[p] - end[p]) ** 2).sum() for p in start)
    assert 0 < ends[10.0] < ends[0.0] / 20
