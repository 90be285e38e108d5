"""Outputs fused: ensembles, sums with a frozen source, stacking and gates, against loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.runs import checkpoints
from tests.contract import assert_same_on_any_devices

KEY, B, D, C = jax.random.key(8), 6, 11, 3  # no other array has the shape of a kernel, [D, C]
M = jt.models


def net(name="net", classes=C, size=D):
    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (size, classes))}}

    return jt.Model(init, lambda v, x, *, train, key: ({"logits": x @ v["params"]["w"]}, {}), name, ("w",))


def weights(seed, classes=C):
    return {"params": {"w": np.random.default_rng(seed).normal(size=(D, classes)).astype(np.float32)}}


def a_batch(seed=0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(B, D)).astype(np.float32),
        "label": rng.integers(0, C, B).astype(np.int32),
    }


def fixed(*seeds):
    return [jt.frozen(net(f"m{seed}"), weights(seed)) for seed in seeds]


def softmax(z):
    return np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)


def applied(model, variables, x):
    run = jax.jit(lambda variables, x: model.apply(variables, x, train=True, key=KEY))
    outputs, state = run(model.complete(variables), x)
    assert state == {}
    return jax.tree.map(np.asarray, outputs)


MEANS = {
    "probabilities": (M.mean_of_probabilities, lambda z, w: sum(a * softmax(one) for a, one in zip(w, z, strict=True))),
    "labels": (
        M.mean_of_label_probabilities,
        lambda z, w: sum(a / (1 + np.exp(-one)) for a, one in zip(w, z, strict=True)),
    ),
    "logits": (M.mean_of_logits, lambda z, w: sum(a * one for a, one in zip(w, z, strict=True))),
}
BACK = {"probabilities": np.exp, "labels": lambda z: 1 / (1 + np.exp(-z)), "logits": lambda z: z}


@pytest.mark.parametrize("given", [None, (2.0, 0.0, 0.5)])
@pytest.mark.parametrize("name", MEANS)
def test_an_ensemble_is_its_mean(name, given):
    x, members = a_batch()["image"], fixed(1, 2, 3)
    combine, expected = MEANS[name]
    model = M.ensemble(members, combine, weights=given)
    variables = model.init(KEY, x)
    assert dict(variables) == {"params": {}}
    outputs = applied(model, variables, x)
    z = [x.astype(float) @ weights(seed)["params"]["w"] for seed in (1, 2, 3)]
    shares = np.ones(3) / 3 if given is None else np.array(given) / sum(given)
    np.testing.assert_allclose(BACK[name](outputs["logits"].astype(float)), expected(z, shares), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["members"], np.stack(z, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("name", ["probabilities", "labels"])
def test_means_of_probabilities_hold_at_extreme_logits(name, scale):
    """A probability that is 0 by rounding has a logarithm, and gradients are finite."""
    z = scale * jnp.asarray([[[1.0, -1.0, 0.0]], [[0.5, -1.0, -1.0]]])
    log_shares = jnp.log(jnp.asarray([[0.25], [0.75]]))
    combine = MEANS[name][0]
    value, slope = jax.jit(jax.value_and_grad(lambda z: jnp.sum(combine(z, log_shares)), argnums=0))(z)
    found = np.asarray(jax.jit(combine)(z, log_shares)[0], float)
    assert np.isfinite(float(value))
    assert np.all(np.isfinite(slope))
    if name == "probabilities":  # the first of both is sure of the first class; 1 and 2 are less likely by their logits
        wide = np.asarray(z, float)
        logs = wide - wide.max(-1, keepdims=True)
        expected = np.maximum(logs[0, 0] + np.log(0.25), logs[1, 0] + np.log(0.75))
        expected[0] = 0
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found[0] > 0.4 * scale
        assert found[1] < -0.9 * scale


def test_half_precision_is_combined_in_single():
    half = jt.Model(
        lambda key, x: {"params": {"w": jnp.zeros((D, C))}},
        lambda v, x, *, train, key: ({"logits": (x @ v["params"]["w"]).astype(jnp.bfloat16)}, {}),
    )
    model = M.ensemble([jt.frozen(half, weights(1)), *fixed(2)])
    outputs = applied(model, {"params": {}}, a_batch()["image"])
    assert outputs["logits"].dtype == np.float32


def test_a_source_that_is_frozen_plus_a_target_that_learns(tmp_path, mesh_of):
    """The sum is the sum, the source is an argument of the program that no step takes away, and no part of a run."""
    source = weights(5)
    model = M.added([jt.frozen(net("source"), source), net("target")])
    assert model.stages == ("target/(?:w)",)
    objective, optimizer = jt.classification(model), optax.sgd(0.5)
    state, batch = jt.init(objective, optimizer, KEY, a_batch()), a_batch()
    w = np.asarray(state.params["added"]["target"]["w"])
    assert set(state.params["added"]) == {"target"}
    z = batch["image"] @ (source["params"]["w"] + w)
    np.testing.assert_allclose(
        applied(model, {"params": state.params["added"]}, batch["image"])["logits"], z, atol=1e-4
    )
    lowered = jt.train_step(objective, optimizer).lower(state, batch).as_text()
    assert not [
        line for line in lowered.splitlines() if "dense<" in line and f"{D}x{C}xf32" in line and len(line) > 400
    ]
    step_ended = {}
    for name, how in {"jit": {}, "pmap": {"mesh": mesh_of(2), "mode": "pmap"}}.items():
        out = tmp_path / "run" if name == "jit" else None
        extra: dict[str, Any] = {"out": out, "progress": False, "model": model if out else None, **how}
        fitted = jt.fit(objective, optimizer, [a_batch(n) for n in range(3)], steps=3, **extra)
        step_ended[name] = np.asarray(fitted.state.params["added"]["target"]["w"])
    np.testing.assert_allclose(step_ended["jit"], step_ended["pmap"], rtol=1e-5, atol=1e-6)
    p = softmax(z) - np.eye(C)[batch["label"]]  # the first step by hand
    first = jt.train_step(objective, optimizer)(state, batch)[0].params["added"]["target"]["w"]
    np.testing.assert_allclose(first, w - 0.5 * batch["image"].T @ p / B, rtol=1e-4, atol=1e-5)
    saved = checkpoints.read(tmp_path / "run" / "checkpoints").leaves
    assert sum(np.shape(leaf) == (D, C) for leaf in saved.values()) == 1
    run = jt.load_run(tmp_path / "run", model=model)
    again = applied(run.model, run.variables, batch["image"])["logits"]
    np.testing.assert_allclose(
        again, batch["image"] @ (source["params"]["w"] + step_ended["jit"]), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(source["params"]["w"], weights(5)["params"]["w"])
    weighted = M.added([*fixed(1, 2)], weights=(1.0, -0.5))
    expected = batch["image"] @ (weights(1)["params"]["w"] - 0.5 * weights(2)["params"]["w"])
    np.testing.assert_allclose(applied(weighted, {"params": {}}, batch["image"])["logits"], expected, atol=1e-4)


def test_it_is_evaluated_averaged_frozen_and_distilled_into_one():
    batch, whole = a_batch(), M.ensemble([*fixed(1, 2), net("own")])
    objective = jt.classification(whole) + jt.averaged(jt.ema(whole, 0.5))
    fitted = jt.fit(objective, optax.sgd(0.3), [a_batch(n) for n in range(3)], steps=3, progress=False)
    own = np.asarray(fitted.state.params["ensemble"]["own"]["w"])
    mean = np.asarray(fitted.state.state["ensemble_ema"]["params"]["own"]["w"])
    assert np.abs(own - mean).max() > 1e-4
    known = [weights(seed)["params"]["w"] for seed in (1, 2)]

    def by_hand(last):
        return np.mean([softmax(batch["image"].astype(float) @ w) for w in (*known, last)], axis=0)

    for model, last in ((whole, own), (jt.ema(whole), mean), (jt.frozen(whole, fitted.state), own)):
        found = jt.evaluate(jt.classification(model), fitted.state, [batch])
        p = by_hand(last)
        assert found["classification"] == pytest.approx(-np.log(p[np.arange(B), batch["label"]]).mean(), rel=1e-4)
        assert found["accuracy"] == pytest.approx(np.mean(p.argmax(1) == batch["label"]))
    student = net("student")
    teach = jt.distillation(student, jt.frozen(whole, fitted.state), temperature=1.0)
    assert len(teach.frozen) == 3  # what it has learned, and the two that never did
    one = jt.fit(teach, optax.adam(0.05), [batch] * 300, steps=300, progress=False)
    w = np.asarray(one.state.params["student"]["w"])
    np.testing.assert_allclose(softmax(batch["image"] @ w), by_hand(own), atol=0.02)


def test_stacking_trains_what_reads_the_probabilities():
    batch = a_batch()
    model = M.stacked(fixed(1, 2), M.head(C, batch_norm=False))
    assert model.stages == ("combiner/.*",)
    fitted = jt.fit(jt.classification(model), optax.sgd(0.1), [batch] * 5, steps=5, progress=False)
    params = fitted.state.params["stacked"]
    assert set(params) == {"combiner"}
    dense = jax.tree.map(np.asarray, params["combiner"]["dense1"])
    read = np.concatenate([softmax(batch["image"] @ weights(seed)["params"]["w"]) for seed in (1, 2)], 1)
    expected = read @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(applied(model, {"params": params}, batch["image"])["logits"], expected, atol=1e-5)
    raw = M.stacked(fixed(1), net("c", size=C), read=lambda x: x)
    kernel = weights(3)["params"]["w"][:C]
    found = applied(raw, {"params": {"combiner": {"w": kernel}}}, batch["image"])["logits"]
    np.testing.assert_allclose(found, batch["image"] @ weights(1)["params"]["w"] @ kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["probabilities", "logits"])
def test_a_gate_tells_whom_to_believe(name):
    batch = a_batch()
    gate = net("gate", 2)
    model = M.gated([*fixed(1), net("own")], gate, MEANS[name][0])
    params = {"own": weights(2)["params"], "gate": weights(3, 2)["params"]}
    outputs = applied(model, {"params": params}, batch["image"])
    z = [batch["image"].astype(float) @ weights(seed)["params"]["w"] for seed in (1, 2)]
    shares = softmax(batch["image"].astype(float) @ params["gate"]["w"])
    np.testing.assert_allclose(outputs["gate"], shares, rtol=1e-5, atol=1e-6)
    expected = sum(shares[:, m, None] * (softmax(z[m]) if name == "probabilities" else z[m]) for m in range(2))
    np.testing.assert_allclose(BACK[name](outputs["logits"].astype(float)), expected, rtol=1e-4, atol=1e-5)
    far = jax.tree.map(lambda w: 1e6 * w, params)
    slope = jax.jit(jax.grad(lambda p: jt.classification(model)(
        {"gated": p}, {"gated": {}}, batch, jt.Context(step=jnp.int32(0), key=KEY))[0]))(far)  # fmt: skip
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


def test_a_linear_gate_is_there_by_default():
    x = a_batch()["image"].reshape(B, D, 1)
    flat = jt.Model(
        lambda key, x: net().init(key, x[:, :, 0]),
        lambda v, x, *, train, key: net().apply(v, x[:, :, 0], train=train, key=key),
    )
    model = M.gated([jt.frozen(flat, weights(1)), jt.frozen(flat, weights(2))])
    params = model.init(KEY, x)["params"]
    assert params["gate"]["dense1"]["kernel"].shape == (D, 2)
    assert set(params) == {"gate"}
    with pytest.raises(jt.InputError, match="so give a gate"):
        model.init(KEY, np.zeros((B, D, 1), np.uint8))


ROWS = {
    "ensemble": lambda model, teacher: M.ensemble([model, teacher, model]),
    "gated": lambda model, teacher: M.gated([model, teacher]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("ensemble", marks=pytest.mark.slow), "gated"])
def test_the_same_on_any_devices(name, mesh_of):
    """With batch norm in a member that trains and in one that is frozen."""

    def make(model):
        teacher = jt.frozen(model.named("t"), model.init(jax.random.key(9), np.zeros((2, 4, 4, 1), np.float32)))
        return jt.classification(ROWS[name](model, teacher)).on("source")

    ended = assert_same_on_any_devices(make, mesh_of, rows=(8, 4), steps=2)
    kept = {path.split("batch_stats/")[1].split("/")[0] for path in ended if "batch_stats" in path}
    assert kept == ({"model"} if name == "gated" else {"model0", "model1"})  # the frozen one keeps none


def test_members_are_told_apart_by_name_and_misuse_is_told(tmp_path):
    model = M.ensemble([net(), net("other"), net()])
    params = model.init(KEY, a_batch()["image"])["params"]
    assert set(params) == {"net0", "other", "net1"}
    for one in params.values():
        assert one["w"].shape == (D, C)
    assert all(jt.tree.matches(f"{name}/w", model.stages[0]) for name in params)
    for members, told in (
        ([], "one or more; got none"),
        ([net(), lambda x: x], "got a function"),
        ([jt.ema(net())], "got a Average"),
        ([net("combiner"), net()], None),
        ([*fixed(1), jt.frozen(net("four", 4), weights(2, 4))], r"different sizes \{'m1': 3, 'four': 4\}"),
    ):
        if told is None:
            with pytest.raises(jt.InputError, match="called 'combiner'"):
                M.stacked(members, M.head(C))
            continue
        with pytest.raises(jt.InputError, match=told):
            M.ensemble(members).init(KEY, a_batch()["image"])
    for given in ((1.0,), (1.0, np.nan), (0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(jt.InputError, match="weights"):
            M.ensemble(fixed(1, 2), weights=given)
    with pytest.raises(jt.InputError, match="weights must be one finite number"):
        M.added(fixed(1, 2), weights=(np.inf, 1.0))
    with pytest.raises(jt.InputError, match="scores"):
        M.ensemble(fixed(1, 2), output="scores").init(KEY, a_batch()["image"])
    with pytest.raises(jt.InputError, match="score for each of the 2 members"):
        M.gated(fixed(1, 2), net("gate", 3)).init(KEY, a_batch()["image"])
    with pytest.raises(jt.InputError, match="is a twin"):
        M.ensemble([net().twin("twin"), net()])


def a_run(folder, names, seed):
    rng = np.random.default_rng(seed)
    data = jt.data.Dataset.from_columns(
        image=rng.integers(0, 255, (8, 6, 6, 1)).astype(np.uint8),
        label=np.arange(8, dtype=np.int32) % 3,
        class_names={"label": names},
    )
    model = M.normalize(M.mlp(3, hidden=(4,)), 0.5, 0.25)
    objective = jt.classification(model)
    jt.fit(
        objective,
        optax.sgd(0.1),
        jt.data.pipeline(data, 4),
        steps=2,
        out=folder,
        progress=False,
        model=model,
        dataset=data,
    )
    return jt.load_run(folder), data


@pytest.mark.slow
def test_runs_are_members_where_their_classes_are_the_same(tmp_path):
    (one, data), (two, _) = (a_run(tmp_path / name, ["a", "b", "c"], n) for n, name in enumerate(("one", "two")))
    model = M.ensemble([one, two])
    images = data.read(np.arange(8))["image"]
    p = [
        softmax(np.asarray(run.model.apply(run.variables, images, train=False, key=None)[0]["logits"]))
        for run in (one, two)
    ]
    found = applied(model, {"params": {}}, images)["logits"]
    np.testing.assert_allclose(np.exp(found), (p[0] + p[1]) / 2, rtol=1e-4, atol=1e-6)
    other, _ = a_run(tmp_path / "other", ["b", "a", "c"], 3)
    with pytest.raises(jt.InputError, match="them in another order, b, a, c"):
        M.ensemble([one, other])
    foreign, _ = a_run(tmp_path / "foreign", ["x", "a", "c"], 3)
    with pytest.raises(jt.InputError, match="others, x, a, c"):
        M.stacked([one, foreign], M.head(3))
    labels = one._replace(config={**one.config, "knows": ["labels"]})
    with pytest.raises(jt.InputError, match="mean_of_label_probabilities"):
        M.gated([labels, labels])
    assert M.ensemble([labels, labels], M.mean_of_label_probabilities).name == "ensemble"
