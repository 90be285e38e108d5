import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.forward import Forward

KEY = jax.random.key(7)


def linear(name="model", classes=3, *, calls=None, dropout=0.0):
    """logits = W·x + b, with dropout of the inputs; notes each trace of apply in `calls`."""

    def init(key, inputs):
        weight = 0.3 * jax.random.normal(key, (inputs.shape[1], classes))
        return {"params": {"body": weight, "head": {"bias": jnp.zeros(classes)}}}

    def apply(variables, inputs, *, train, key):
        if calls is not None:
            calls.append((name, train))
        if train and dropout:
            inputs = jnp.where(jax.random.bernoulli(key, 1 - dropout, inputs.shape), inputs, 0)
        params = variables["params"]
        return {"logits": inputs @ params["body"] + params["head"]["bias"][None], "inputs": inputs}, {}

    return jt.Model(init, apply, name, ("body", "head"))


def counting(name="model"):
    """A linear model whose state counts its training calls and keeps the order in which it saw batches."""

    def init(key, inputs):
        fresh = {"calls": jnp.zeros(()), "trail": jnp.ones(())}
        return {"params": {"w": jnp.full((inputs.shape[1], 3), 0.1)}, "stats": fresh}

    def apply(variables, inputs, *, train, key, axis=None):
        stats = variables["stats"]
        if train:
            stats = {"calls": stats["calls"] + 1, "trail": 2 * stats["trail"] + inputs[0, 0]}
        return {"logits": inputs @ variables["params"]["w"]}, {"stats": stats}

    return jt.Model(init, apply, name, ("w",))


def constant(value, name):
    """An objective of a known value, with the gradient 1 for `params["p"]`."""

    def loss(outputs, params, state, batch, ctx):
        total = value + params["p"]
        return total, state, {name: jt.Mean(total, jnp.ones(()))}

    return jt.Objective(name, (), loss, setup=lambda key, batch: ({"p": jnp.zeros(())}, {}))


def a_batch(rng, rows=8, classes=3):
    return {
        "image": rng.normal(size=(rows, 4)).astype(np.float32),
        "label": rng.integers(0, classes, rows).astype(np.int32),
    }


def run(objective, batch, *, step=0, params=None, state=None, key=KEY):
    if params is None:
        params, state = objective.init(key, batch)
    ctx = jt.Context(step=jnp.int32(step), key=key)
    return jax.jit(lambda *given: objective(*given, ctx))(params, state, batch)  # one program, not one an operation


def value_of(objective, step=0):
    loss, _, _ = objective({"p": jnp.zeros(())}, {}, {}, jt.Context(step=jnp.int32(step)))
    return float(loss)


def ce_loop(logits, labels):
    logits = np.asarray(logits, np.float64)
    return np.mean(
        [np.log(np.exp(row - row.max()).sum()) + row.max() - row[y] for row, y in zip(logits, labels, strict=True)]
    )


A, B = constant(2.0, "a"), constant(5.0, "b")


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (A + B, 7),
        (A - B, -3),
        (-A, -2),
        (A + 3 * B, 17),
        (0.5 * A, 1),
        (A * 0.5, 1),
        (A / 4, 0.5),
        (A / np.float32(4), 0.5),
        (np.float64(0.5) * A, 1),
        (A * np.float64(0.5), 1),
        (np.float32(0.5) * A, 1),
        (np.int64(3) * A, 6),
        (np.array(0.5) * A, 1),
        (A * np.array(0.5), 1),
        (jnp.float32(0.5) * A, 1),
        (A * jnp.float32(0.5), 1),
        (jnp.bfloat16(0.5) * A, 1),
        (A / jnp.float32(4), 0.5),
        (np.float32(2) * A - B / np.int32(5), 3),
        (2 * (A + 3 * B), 34),
        (0 * A + B, 5),
        (sum([A, B, constant(1.0, "c")]), 8),
        (sum(w * t for w, t in [(0.25, A), (2, B)]), 10.5),
        ((1 - 0.25) * A + 0.25 * 4 * B, 6.5),
    ],
)
def test_arithmetic_reads_like_the_formula(objective, expected):
    assert value_of(objective) == pytest.approx(expected, rel=1e-6)


def test_arithmetic_of_gradients():
    objective = np.float64(0.5) * A - B / 4 + jnp.float32(3) * constant(0.0, "c")
    grad = jax.grad(lambda p: objective(p, {}, {}, jt.Context())[0])({"p": jnp.zeros(())})
    assert float(grad["p"]) == pytest.approx(0.5 - 0.25 + 3)


@pytest.mark.parametrize("left", [True, False])
def test_a_weight_may_be_a_schedule_of_the_step(left):
    schedule = optax.linear_schedule(0.0, 2.0, transition_steps=4)
    objective = B + (schedule * A if left else A * schedule)
    assert [value_of(objective, step) for step in (0, 1, 4, 9)] == pytest.approx([5, 6, 9, 9])
    assert value_of(A / (lambda step: 1.0 + step), 3) == pytest.approx(0.5)
    nested = (lambda step: 10.0**step) * (schedule * A)
    assert value_of(nested, 2) == pytest.approx(100 * 1.0 * 2)


def test_a_schedule_is_followed_by_the_compiled_step(rng):
    batch = a_batch(rng)
    objective = (lambda step: step) * jt.l2() + 0 * jt.classification(linear())
    optimizer = optax.sgd(0.0)
    state, step = jt.init(objective, optimizer, KEY, batch), jt.train_step(objective, optimizer)
    norm = 0.5 * sum(float((np.asarray(w, np.float64) ** 2).sum()) for w in jax.tree.leaves(state.params))
    for number in range(3):
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == pytest.approx(number * norm, rel=1e-6)
        assert float(metrics["l2"]) == pytest.approx(norm, rel=1e-6)


def test_nonsense_is_refused():
    with pytest.raises(TypeError, match="objective times an objective"):
        _ = A * B
    for nonsense in (lambda: A + 1, lambda: 1 + A, lambda: A - 1, lambda: A + "b", lambda: 1 - A):
        with pytest.raises(TypeError):
            nonsense()
    for weight in (np.ones(2), jnp.ones(2), [1.0, 2.0], np.ones(1)):
        with pytest.raises(jt.InputError, match="scalar or a schedule"):
            _ = A * weight
    with pytest.raises(jt.InputError, match="scalar or a schedule"):
        _ = np.ones(2) * A


def test_metrics_are_unweighted_and_under_each_terms_name(rng):
    batch, model = a_batch(rng), linear()
    objective = 0.25 * jt.classification(model) + 7 * jt.l2(strength=0.5) - 2 * jt.l2(only="head").named("head_l2")
    params, state = objective.init(KEY, batch)
    params["model"]["head"]["bias"] = jnp.array([1.0, -2.0, 0.5])
    loss, _, metrics = run(objective, batch, params=params, state=state)
    assert sorted(metrics) == ["accuracy", "classification", "head_l2", "l2"]
    weight, bias = (np.asarray(params["model"][k], np.float64) if k == "body" else None for k in ("body", "head"))
    bias = np.array([1.0, -2.0, 0.5])
    logits = batch["image"].astype(np.float64) @ weight + bias
    expected = {
        "classification": ce_loop(logits, batch["label"]),
        "accuracy": np.mean(logits.argmax(1) == batch["label"]),
        "l2": 0.25 * ((weight**2).sum() + (bias**2).sum()),
        "head_l2": 0.5 * (bias**2).sum(),
    }
    for name, value in expected.items():
        assert float(metrics[name].value) == pytest.approx(value, rel=1e-5), name
    total = 0.25 * expected["classification"] + 7 * expected["l2"] - 2 * expected["head_l2"]
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_named_and_on_compose():
    model = linear()
    batch = {"image": jnp.ones((4, 2)), "label": jnp.zeros(4, jnp.int32)}

    def names(objective, batch):
        return sorted(run(objective, batch)[2])

    term = jt.classification(model)
    assert names(term.named("ce"), batch) == ["ce", "ce/accuracy"]
    assert names(term.on("s"), {"s": batch}) == ["s/accuracy", "s/classification"]
    assert names(term.named("ce").on("s"), {"s": batch}) == ["s/ce", "s/ce/accuracy"]
    assert names(term.on("s").named("ce"), {"s": batch}) == ["ce", "ce/s/accuracy"]
    assert names(term.on("a").on("b"), {"b": {"a": batch}}) == ["b/a/accuracy", "b/a/classification"]
    assert names(3 * (term + jt.l2()).named("all"), batch) == ["all/accuracy", "all/classification", "all/l2"]
    assert value_of((A + B).named("all")) == 7


def test_on_reads_its_own_part_with_its_own_mask(rng):
    batch = {"s": a_batch(rng, 6), "t": {**a_batch(rng, 4), "mask": np.array([1, 0, 1, 0], np.float32)}}
    model = linear()
    objective = jt.classification(model).on("s") + 10 * jt.classification(model).on("t")
    params, state = objective.init(KEY, batch)
    loss, _, metrics = run(objective, batch, params=params, state=state)
    weight = np.asarray(params["model"]["body"], np.float64)
    source = ce_loop(batch["s"]["image"] @ weight, batch["s"]["label"])
    target = ce_loop(batch["t"]["image"][::2] @ weight, batch["t"]["label"][::2])
    assert float(loss) == pytest.approx(source + 10 * target, rel=1e-5)
    assert float(metrics["t/classification"].value) == pytest.approx(target, rel=1e-5)
    assert int(metrics["t/accuracy"].count) == 2


def test_two_metrics_of_one_name_are_an_error_at_init(rng):
    batch = a_batch(rng)
    objective = jt.classification(linear()) + jt.l2(only="head") + jt.l2(only="body")
    with pytest.raises(jt.InputError, match=r"metric 'l2'.*named"):
        jt.init(objective, optax.sgd(0.1), KEY, batch)
    renamed = jt.classification(linear()) + jt.l2(only="head") + jt.l2(only="body").named("l2_body")
    jt.init(renamed, optax.sgd(0.1), KEY, batch)


def test_two_objects_under_one_name_are_an_error_where_they_meet():
    one, other = linear(), linear()
    with pytest.raises(jt.InputError, match=r"two different models are named 'model'.*named\('other'\)"):
        _ = jt.classification(one) + jt.classification(other)
    with pytest.raises(jt.InputError, match="two different models"):
        _ = jt.classification(one).on("a") + 2 * jt.classification(one.inference()).on("b")
    _ = jt.classification(one) + jt.classification(other.named("other")).named("second")
    _ = jt.classification(one) + jt.classification(one).named("again")


def test_a_frozen_model_may_share_the_name_of_a_trained_one(rng):
    batch, model = a_batch(rng), linear()
    teacher = jt.frozen(model, model.init(jax.random.key(1), batch["image"]))
    objective = jt.classification(model) + jt.classification(teacher).named("teacher")
    params, _ = objective.init(KEY, batch)
    assert sorted(params) == ["model"]
    _, _, metrics = run(objective, batch)
    student = ce_loop(batch["image"] @ np.asarray(params["model"]["body"], np.float64), batch["label"])
    fixed = teacher.variables.tree["params"]["body"]
    assert float(metrics["classification"].value) == pytest.approx(student, rel=1e-5)
    expected = ce_loop(batch["image"] @ np.asarray(fixed, np.float64), batch["label"])
    assert float(metrics["teacher"].value) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(student, rel=1e-3)


def test_a_shared_forward_runs_once(rng):
    calls, batch = [], a_batch(rng)
    model = linear(calls=calls)

    def dots(objective):
        state = jt.init(objective, optax.sgd(0.1), KEY, batch)
        return jt.train_step(objective, optax.sgd(0.1)).lower(state, batch).as_text().count("dot_general")

    one = jt.classification(model)
    two = one + 0.5 * jt.classification(model, label_smoothing=0.1).named("smooth") + 2 * one.named("third")
    run(two, batch)
    assert calls == [("model", True)]
    assert dots(two) == dots(one) > 0
    other = one + jt.classification(linear("other")).named("second")
    assert dots(other) == 2 * dots(one)  # the count can tell


def test_two_views_are_two_forwards(rng):
    calls, model = [], linear(calls=[])
    model = linear(calls=calls)
    batch = {"a": a_batch(rng), "b": a_batch(rng)}
    term = jt.classification(model)
    run(term.on("a") + term.on("b") + 3 * term.on("a").named("again"), batch)
    assert calls == [("model", True)] * 2


def test_running_state_is_updated_once_per_forward_and_from_left_to_right(rng):
    model, batch = counting(), {"source": a_batch(rng), "target": a_batch(rng)}
    term = jt.classification(model)
    _, state, _ = run(term + term.named("b") + term.named("c"), batch["source"])
    assert float(state["model"]["stats"]["calls"]) == 1
    first, second = (batch[k]["image"][0, 0] for k in ("source", "target"))
    for order, (x, y) in {
        ("source", "target"): (first, second),
        ("target", "source"): (second, first),
    }.items():
        _, state, _ = run(term.on(order[0]) + term.on(order[1]), batch)
        assert float(state["model"]["stats"]["calls"]) == 2
        assert float(state["model"]["stats"]["trail"]) == pytest.approx(2 * (2 + x) + y, rel=1e-6)


def test_batch_norm_is_updated_once(rng):
    model = jt.models.small_cnn(3, width=2)
    batch = {"image": rng.normal(size=(8, 4, 4, 1)).astype(np.float32), "label": rng.integers(0, 3, 8)}
    one = jt.classification(model)
    params, fresh = one.init(KEY, batch)

    def after(objective):
        return jax.jit(lambda p, s: objective(p, s, batch, jt.Context(key=KEY))[1])(params, fresh)

    alone, shared = after(one), after(one + jt.classification(model, label_smoothing=0.2).named("b"))
    for path, leaf in jt.tree.leaves_by_path(alone).items():
        assert np.any(leaf != jt.tree.leaves_by_path(fresh)[path])
        np.testing.assert_allclose(jt.tree.leaves_by_path(shared)[path], leaf, rtol=1e-6, atol=1e-7, err_msg=path)


def test_draws_depend_on_names_alone(rng):
    batch = a_batch(rng)
    student, other = linear("student", dropout=0.5), linear("other", dropout=0.5)

    def draws(objective, model, step=0, key=KEY):
        params, state = objective.init(KEY, batch)
        outputs, _ = objective.run(params, state, batch, jt.Context(step=jnp.int32(step), key=key))
        (mine,) = [out for forward, out in outputs.items() if forward.model is model]
        return np.asarray(mine["inputs"])

    alone, second = jt.classification(student), jt.classification(other).named("b")
    np.testing.assert_array_equal(draws(alone, student), draws(second + alone, student))
    np.testing.assert_array_equal(draws(alone, student), draws(alone + second, student))
    pattern = draws(alone + second, student) == 0
    assert 0.2 < pattern.mean() < 0.8
    assert np.any(pattern != (draws(alone + second, other) == 0))  # another name, another draw
    assert np.any(pattern != (draws(alone, student, step=1) == 0))  # another step
    assert np.any(pattern != (draws(alone, student, key=jax.random.key(8)) == 0))  # another key
    fresh = (alone + second).init(KEY, batch)[0]
    chex.assert_trees_all_equal(fresh["student"], alone.init(KEY, batch)[0]["student"])
    assert np.any(np.asarray(fresh["student"]["body"]) != np.asarray(fresh["other"]["body"]))


def test_draws_differ_between_views(rng):
    batch = {"a": a_batch(rng), "b": a_batch(rng)}
    model = linear(dropout=0.5)
    objective = jt.classification(model).on("a") + jt.classification(model).on("b")
    params, state = objective.init(KEY, batch)
    outputs, _ = objective.run(params, state, batch, jt.Context(step=jnp.int32(0), key=KEY))
    first, second = (np.asarray(out["inputs"]) == 0 for out in outputs.values())
    assert np.any(first != second)


def test_frozen_trees_are_deduplicated_by_identity(rng):
    batch, model = a_batch(rng), linear()
    anchor = {"model": model.init(KEY, batch["image"])["params"]}
    equal = jax.tree.map(lambda x: x, anchor)  # the same leaves in another dict
    task = jt.classification(model)
    both = task + jt.l2_sp(anchor) + jt.l2_sp(anchor, strength=2.0).named("b")
    assert len(both.frozen) == 1
    assert len((both + jt.l2_sp(equal).named("c")).frozen) == 2
    teacher = model.init(KEY, batch["image"])
    two = jt.classification(jt.frozen(model, teacher)) + jt.classification(jt.frozen(model, teacher)).named("b")
    assert len(two.frozen) == len(two.forwards) == 1


def test_frozen_trees_are_readable_after_training(rng):
    batch, model = a_batch(rng), linear()
    variables = model.init(jax.random.key(3), batch["image"])
    anchor = {"model": variables["params"]}
    teacher = jt.frozen(linear("teacher"), model.init(jax.random.key(4), batch["image"]))
    kept = jax.tree.map(np.array, (anchor, teacher.variables.tree))
    objective = jt.classification(model) + 0.1 * jt.l2_sp(anchor) + jt.classification(teacher).named("t")
    optimizer = optax.adam(0.1)
    state, step = (
        jt.init(objective, optimizer, KEY, batch, params=anchor),
        jt.train_step(objective, optimizer),
    )
    for _ in range(3):
        state, metrics = step(state, batch)
    assert float(metrics["l2_sp"]) > 0
    chex.assert_trees_all_equal(kept, (anchor, teacher.variables.tree))


def test_frozen_weights_get_no_gradient(rng):
    batch, model = a_batch(rng), linear()
    weights = model.init(jax.random.key(3), batch["image"])
    anchor = {"model": jax.tree.map(lambda w: w + 1.0, weights["params"])}
    teacher = jt.frozen(linear("teacher"), weights)
    objective = jt.classification(model) + jt.classification(teacher).named("t") + jt.l2_sp(anchor)
    params, state = objective.init(KEY, batch)

    def loss(params, trees):
        ctx = jt.Context(key=KEY, frozen=dict(zip(objective.frozen, trees, strict=True)))
        return objective(params, state, batch, ctx)[0]

    trees = [handle.tree for handle in objective.frozen]
    ours, theirs = jax.grad(loss, argnums=(0, 1))(params, trees)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(theirs))
    assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(ours))
    # the tree given in the context is the one that is read
    moved = [jax.tree.map(lambda w: w + 1, tree) for tree in trees]
    assert float(loss(params, moved)) != pytest.approx(float(loss(params, trees)), rel=1e-3)


def test_a_frozen_model_runs_in_inference_mode_and_keeps_its_state(rng):
    batch, model = a_batch(rng), counting()
    teacher = jt.frozen(model, model.init(KEY, batch["image"]))
    _, state, _ = run(jt.classification(teacher), batch)
    assert state == {}
    assert float(teacher.variables.tree["stats"]["calls"]) == 0
    calls = []
    fixed = linear("teacher", calls=calls)
    objective = jt.classification(jt.frozen(fixed, fixed.init(KEY, batch["image"])))
    run(objective, batch)
    assert calls == [("teacher", False)]


def test_inference_ignores_training_and_keeps_the_state(rng):
    batch, model = a_batch(rng), counting()
    _, state, _ = run(jt.classification(model.inference()), batch)
    assert float(state["model"]["stats"]["calls"]) == 0


def test_mean_of_nothing_is_zero():
    assert float(jt.Mean(jnp.zeros(()), jnp.zeros(())).value) == 0
    values = jnp.array([1.0, jnp.nan, 3.0])
    mean = jt.Context().mean(values, jnp.zeros(3))
    assert float(mean.value) == 0
    assert float(mean.count) == 0
    grad = jax.grad(lambda v: jt.Context().mean(v, jnp.zeros(3)).value)(values)
    np.testing.assert_array_equal(grad, np.zeros(3))


@pytest.mark.parametrize("mask_type", [np.float32, np.int32, bool])
def test_mean_is_weighted_by_the_mask(rng, mask_type):
    values = rng.normal(size=7).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 0, 0, 1]).astype(mask_type)
    mean = jt.Context().mean(jnp.asarray(values), jnp.asarray(mask))
    expected = np.mean([v for v, m in zip(values, mask, strict=True) if m], dtype=np.float64)
    assert float(mean.value) == pytest.approx(expected, rel=1e-6)
    assert float(mean.count) == 4
    weights = np.array([0.5, 0, 2, 1, 0, 0.25, 1], np.float32)
    weighted = jt.Context().mean(jnp.asarray(values), jnp.asarray(weights))
    assert float(weighted.value) == pytest.approx((values * weights).sum() / weights.sum(), rel=1e-5)


def test_mean_accumulates_low_precision_in_float32():
    values = jnp.full(4096, 0.1, jnp.bfloat16)
    mean = jt.Context().mean(values)
    assert mean.total.dtype == jnp.float32
    assert float(mean.value) == pytest.approx(float(jnp.bfloat16(0.1)), rel=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_masked_rows_contribute_neither_value_nor_gradient(rng, poison):
    def bias_model():
        def init(key, inputs):
            return {"params": {"bias": jnp.array([0.1, -0.2, 0.3])}}

        return jt.Model(init, lambda v, x, *, train, key: ({"logits": x + v["params"]["bias"][None]}, {}))

    images = rng.normal(size=(5, 3)).astype(np.float32)
    clean = {
        "image": images,
        "label": np.array([0, 2, 1, 1, 0]),
        "mask": np.array([1, 0, 1, 1, 0], np.float32),
    }
    poisoned = {**clean, "image": np.where(clean["mask"][:, None] > 0, images, poison).astype(np.float32)}
    poisoned["label"] = np.array([0, -1, 1, 1, 99])
    soft = {**poisoned, "label": np.eye(3, dtype=np.float32)[clean["label"]]}
    soft["label"][1] = poison
    objective = jt.classification(bias_model())
    params, state = objective.init(KEY, clean)

    def both(batch):
        value = jax.value_and_grad(lambda p, batch: objective(p, state, batch, jt.Context(key=KEY))[0])
        return jax.jit(value)(params, batch)

    expected = both({k: v[[0, 2, 3]] for k, v in clean.items() if k != "mask"})
    for batch in (clean, poisoned, soft):
        value, grads = both(batch)
        assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
        np.testing.assert_allclose(grads["model"]["bias"], expected[1]["model"]["bias"], rtol=1e-5)


def test_a_missing_entry_of_the_batch_is_named(rng):
    model, batch = linear(), a_batch(rng)
    cases = [
        (jt.classification(model), {"image": batch["image"]}, r"batch\['label'\].*\['image'\]"),
        (jt.classification(model).on("source"), batch, r"batch\['source'\].*\['image', 'label'\]"),
        (jt.classification(model).on("s"), {"s": {"label": batch["label"]}}, r"batch\['s/image'\]"),
    ]
    for objective, wrong, message in cases:
        with pytest.raises(jt.InputError, match=message):
            jt.init(objective, optax.sgd(0.1), KEY, wrong)


def test_labels_out_of_range_are_an_error_at_init(rng):
    batch, model = a_batch(rng), linear()
    for label in (3, -1):
        wrong = {**batch, "label": batch["label"].copy()}
        wrong["label"][2] = label
        with pytest.raises(jt.InputError, match=re.escape("[0, 3)") + f".*got {label}"):
            jt.init(jt.classification(model), optax.sgd(0.1), KEY, wrong)
        mask = np.ones(8, np.float32)
        mask[2] = 0
        jt.init(jt.classification(model), optax.sgd(0.1), KEY, {**wrong, "mask": mask})
        with pytest.raises(jt.InputError, match=f"got {label}"):
            jt.init(jt.classification(model).on("s") * 2 + jt.l2(), optax.sgd(0.1), KEY, {"s": wrong})


def test_objectives_of_low_precision_weigh_in_the_type_of_the_loss(x64):
    double = jt.Objective("d", (), lambda o, p, s, b, c: (jnp.float64(1) / 3, s, {}))
    single = jt.Objective("f", (), lambda o, p, s, b, c: (jnp.float32(1) / 3, s, {}))
    for weight in (0.1, np.float64(0.1), lambda step: jnp.float64(0.1)):
        assert (weight * double)({}, {}, {}, jt.Context())[0].dtype == jnp.float64
        assert (weight * single)({}, {}, {}, jt.Context())[0].dtype == jnp.float32
    assert float((0.1 * double)({}, {}, {}, jt.Context())[0]) == pytest.approx(0.1 / 3, rel=1e-14)


def test_a_model_without_axis_runs_under_pmap_unless_it_has_state(rng):
    from jaxtransfer.models import normalize

    images = rng.normal(size=(4, 2)).astype(np.float32)
    plain = normalize(linear(), 0.5, 2.0)
    assert plain.apply(plain.init(KEY, images), images, train=True, key=KEY, axis="batch")[0]["logits"].shape == (4, 3)

    def apply(variables, inputs, *, train, key):
        return {"logits": inputs}, {"stats": variables["stats"]}

    stateful = jt.Model(lambda key, inputs: {}, apply, "mine")
    variables = {"params": {}, "stats": {"mean": jnp.zeros(2)}}
    with pytest.raises(jt.InputError, match=r"'mine' has running state.*axis"):
        stateful.apply(variables, images, train=True, key=KEY, axis="batch")
    stateful.apply(variables, images, train=True, key=KEY)
    stateful.apply(variables, images, train=False, key=None, axis="batch")


class TestJoinedViews:
    def test_one_forward_over_two_views(self, rng):
        model, runs = jt.models.small_cnn(3, width=4), []
        apply = model.apply
        counted = dataclasses.replace(model, apply=lambda *a, **k: (runs.append(a[1].shape), apply(*a, **k))[1])
        forward = Forward.of(counted, ("image", "image2"))

        def loss(outputs, params, state, batch, ctx):
            one, two = outputs[forward]
            value = ctx.mean(jnp.sum(one["features"] * two["features"], -1))
            return value.value, state, {"both": value}

        objective = jt.Objective("both", (forward,), loss)
        batch = {name: rng.normal(size=(6, 5, 4, 1)).astype(np.float32) for name in ("image", "image2")}
        params, state = objective.init(jax.random.key(0), batch)
        runs.clear()
        value, after, _ = jax.jit(lambda *given: objective(*given, jt.Context()))(params, state, batch)
        assert runs == [(12, 5, 4, 1)]
        variables = {"params": params["model"], **state["model"]}
        both = np.concatenate([batch["image"], batch["image2"]])
        outputs, expected = jax.jit(lambda *given: model.apply(*given, train=True, key=None))(variables, both)
        one, two = np.split(np.asarray(outputs["features"]), 2)
        np.testing.assert_allclose(value, np.mean(np.sum(one * two, -1)), rtol=1e-5)
        for got, want in zip(jax.tree.leaves(after["model"]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        under = objective.on("source")
        assert under.forwards[0].views == (("source", "image"), ("source", "image2"))
        again = jax.jit(lambda *given: under(*given, jt.Context())[0])(params, state, {"source": batch})
        np.testing.assert_allclose(again, value, rtol=1e-6)

    def test_a_view_that_is_missing_is_named(self):
        objective = jt.Objective("x", (Forward.of(jt.models.mlp(3), ("image", "image2")),), lambda *a: None)
        with pytest.raises(jt.InputError, match="reads batch\\['image2'\\]"):
            objective.run({"model": {}}, {}, {"image": np.zeros((2, 3))}, jt.Context())
