"""`together`: each model runs once on all views that its terms read, and every loss keeps its own rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt

KEY = jax.random.key(3)
ROWS, D, C = {"source": 6, "target": 4}, 5, 3


def normalised(name="model", calls=None, init_calls=None):
    """A linear layer after batch norm; notes (name, rows, train) of each run."""

    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (D, C))}, "stats": {"mean": jnp.zeros(D), "seen": jnp.zeros(())}}

    def apply(variables, x, *, train, key, axis=None):
        if calls is not None:
            calls.append((name, x.shape[0], train))
        mean, seen = variables["stats"]["mean"], variables["stats"]["seen"]
        if train:
            mean, seen = x.mean(0), seen + 1
        z = (x - mean[None]) @ variables["params"]["w"]
        return {"logits": z, "projection": z}, {"stats": {"mean": mean, "seen": seen}}

    return jt.Model(init, apply, name)


def a_batch(seed=0):
    rng = np.random.default_rng(seed)

    def part(rows, shift):
        x = rng.normal(size=(rows, D)).astype(np.float32) + np.float32(shift)
        mask = np.float32(np.arange(rows) > 0)
        return {"image": x, "image2": -x, "label": rng.integers(0, C, rows), "mask": mask}

    return {name: part(rows, shift) for (name, rows), shift in zip(ROWS.items(), (2, -1), strict=True)}


def run(objective, batch, seed=0, **context):
    params, state = objective.init(jax.random.key(seed), batch)
    return params, *jax.jit(lambda p, s: objective(p, s, batch, jt.Context(key=KEY, **context)))(params, state)


def cross_entropy(x, part):
    x = np.float64(x)
    values = np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), part["label"]]
    return np.average(values, weights=part["mask"])


def domains(model):
    term = jt.classification(model)
    return term.on("source") + 0.5 * term.on("target")


def test_batch_norm_sees_both_domains_in_one_run():
    calls, batch = [], a_batch()
    objective = jt.together(domains(normalised(calls=calls)))
    params, value, state, metrics = run(objective, batch)
    assert calls == [("model", 10, True)]
    mean = np.concatenate([batch[name]["image"] for name in ROWS]).astype(np.float64).mean(0)
    w = np.float64(params["model"]["w"])
    want = {name: cross_entropy((batch[name]["image"] - mean) @ w, batch[name]) for name in ROWS}
    for name in ROWS:
        assert float(metrics[f"{name}/classification"].value) == pytest.approx(want[name], rel=1e-5)
    assert float(value) == pytest.approx(want["source"] + 0.5 * want["target"], rel=1e-5)
    np.testing.assert_allclose(state["model"]["stats"]["mean"], mean, rtol=1e-5)
    assert float(state["model"]["stats"]["seen"]) == 1
    calls.clear()
    _, apart, _, _ = run(domains(normalised(calls=calls)), batch)
    assert [rows for _, rows, _ in calls] == [6, 4]
    assert abs(float(apart) - float(value)) > 0.05  # domains far apart: it does matter


def test_in_evaluation_it_is_the_same_objective():
    model = normalised()
    batch, objective = a_batch(), domains(model)
    for context in ({"train": False}, {"train": True}):
        left, right = (run(one, batch, **context)[1:] for one in (objective, jt.together(objective)))
        same = abs(float(left[0]) - float(right[0])) < 1e-6
        assert same != context["train"]
    state = jt.init(jt.together(objective), optax.sgd(0.1), KEY, batch)
    told = [jt.evaluate(one, state, [batch, a_batch(1)]) for one in (objective, jt.together(objective))]
    assert told[0] == pytest.approx(told[1], rel=1e-6)
    assert "source/accuracy" in told[0]


def ramp(step):
    return 0.1 * (step + 1)


def test_a_sum_stays_the_sum_of_its_terms():
    objective = domains(normalised()) + ramp * jt.l2()
    joined = jt.together(objective)
    assert str(joined) == str(objective)
    assert [weight for weight, _ in joined.terms][1] == 0.5
    total, parts = (run(one, a_batch())[1] for one in (joined, sum((w * t for w, t in joined.terms), start=0)))
    assert float(total) == pytest.approx(float(parts), rel=1e-6)
    assert jt.together(jt.l2()).forwards == ()


def test_it_composes_with_what_changes_objectives():
    calls, batch = [], a_batch()
    model = normalised(calls=calls)
    plain = jt.together(domains(model))
    _, want, _, metrics = run(plain, batch)
    calls.clear()
    changed = (2 * jt.together(jt.together(domains(model).named("all"))) / 2).on("outer").on("most")
    _, value, _, renamed = run(changed, {"most": {"outer": batch}})
    assert calls == [("model", 10, True)]
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    assert renamed.keys() == {f"most/outer/all/{name}" for name in metrics}
    calls.clear()
    extra = jt.classification(model, view="image2").on("target").named("flipped")
    run(plain + extra, batch)
    assert [rows for _, rows, _ in calls] == [10, 4]  # what stands outside runs by itself
    calls.clear()
    run(jt.together(plain + extra), batch)
    assert calls == [("model", 14, True)]


def test_views_that_several_terms_read_are_joined_once():
    calls, batch = [], a_batch()
    model = normalised(calls=calls)
    mask = {name: part.pop("mask") for name, part in batch.items()}
    assert mask
    pair = jt.simclr(model)
    objective = jt.together(pair.on("source") + jt.classification(model).on("source").named("a") + pair.on("target"))
    params, _, _, metrics = run(objective, batch)
    assert calls == [("model", 2 * 6 + 2 * 4, True)]
    rows = {(name, view): batch[name][view] for name in ROWS for view in ("image", "image2")}
    mean = np.concatenate(list(rows.values())).astype(np.float64).mean(0)
    w = np.float64(params["model"]["w"])
    want = cross_entropy((batch["source"]["image"] - mean) @ w, {**batch["source"], "mask": np.ones(6)})
    assert float(metrics["a"].value) == pytest.approx(want, rel=1e-5)
    one, two = ((rows["target", view] - mean) @ w for view in ("image", "image2"))
    nt_xent = jt.losses.nt_xent(np.float32(one), np.float32(two), temperature=0.5)
    assert float(metrics["target/simclr"].value) == pytest.approx(float(np.mean(nt_xent)), rel=1e-4)


def test_frozen_and_averaged_models_run_once_too():
    calls, batch = [], a_batch()
    model = normalised("student", calls=calls)
    weights = {"params": {"w": np.ones((D, C), np.float32)}, "stats": {"mean": np.zeros(D), "seen": np.zeros(())}}
    teacher, slow = jt.frozen(normalised("teacher", calls=calls), weights), jt.ema(model, 0.5)
    terms = [
        term.on(name).named(f"{name} {number}")
        for name in ROWS
        for number, term in enumerate((jt.distillation(model, teacher), jt.distillation(model, slow)))
    ]
    apart = sum(terms[1:], start=terms[0])
    _, _, state, _ = run(jt.together(apart), batch)
    assert sorted(calls) == [("student", 10, True), ("student", 10, True), ("teacher", 10, False)]
    assert set(state) == {"student", "student_ema"}
    assert float(state["student_ema"]["stats"]["seen"]) == 1


def test_models_that_run_otherwise():
    batch = a_batch()
    calls = []
    model = normalised(calls=calls)
    _, value, state, _ = run(jt.together(domains(model.inference())), batch)
    assert calls == [("model", 10, False)]
    _, want, _, _ = run(domains(normalised()), batch, train=False)
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert float(state["model"]["stats"]["seen"]) == 0
    calls.clear()
    small = jt.micro_batched(normalised(calls=calls), 5)
    run(jt.together(domains(small)), batch)
    assert {rows for _, rows, _ in calls} == {5}  # of the ten that it is shown at once


def test_views_of_other_shapes_are_refused():
    batch = a_batch()
    batch["target"]["image"] = batch["target"]["image"][:, :4]
    with pytest.raises(jt.InputError, match="differ in their number of rows alone"):
        jt.init(jt.together(domains(normalised())), optax.sgd(0.1), KEY, batch)
