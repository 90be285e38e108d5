"""Co-teaching: what each network chooses for the other, against loops; the places of rows among all devices'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from jaxtransfer.parts.rows import ranked

KEY, B, D, C = jax.random.key(2), 10, 4, 3


def net(name="a", classes=C):
    def init(key, x):
        return {"params": {"w": jax.random.normal(key, (D, classes))}}

    return jt.Model(init, lambda v, x, *, train, key: ({"logits": x @ v["params"]["w"]}, {}), name)


def a_batch(seed=0, **more) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {"image": np.float32(rng.normal(size=(B, D))), "label": np.int32(rng.integers(0, C, B)), **more}


def compiled(objective, batch, *, train=True, gradient=True, same=False):
    """A function of the step: value, metrics and gradient at fresh weights, and those weights."""
    params, state = objective.init(KEY, batch)
    if same:
        params = {**params, "b": params["a"]}

    def total(params, batch, step):
        value, _, metrics = objective(params, state, batch, jt.Context(step=step, key=KEY, train=train))
        return value, metrics

    run = jax.jit(jax.value_and_grad(total, has_aux=True) if gradient else lambda *given: (total(*given), None))

    def call(step=0):
        (value, metrics), slope = run(params, batch, jnp.int32(step))
        return float(value), {name: float(one.value) for name, one in metrics.items()}, slope, params

    return call


def logs(params, name, batch):
    z = np.asarray(batch["image"], float) @ np.asarray(params[name]["w"], float)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def chosen_by(values, candidates, share):
    """The rows of the smallest losses, by counting."""
    rows = sorted(candidates, key=lambda row: values[row])
    return rows[: max(int(np.floor(share * len(rows) + 1e-9)), min(len(rows), 1))]


def by_hand(params, batch, share, *, disagree=False):
    """The loss of each, what was chosen for it, and the gradient of the first, by loops."""
    weights = batch.get("mask", np.ones(B)) * batch.get("weight", np.ones(B))
    found = {name: logs(params, name, batch) for name in "ab"}
    values = {name: [-own[row, y] for row, y in enumerate(batch["label"])] for name, own in found.items()}
    candidates = [row for row in range(B) if weights[row] > 0]
    if disagree:
        candidates = [row for row in candidates if found["a"][row].argmax() != found["b"][row].argmax()]
    rows = {"a": chosen_by(values["b"], candidates, share), "b": chosen_by(values["a"], candidates, share)}
    total = {n: sum(weights[r] * values[n][r] for r in rows[n]) / sum(weights[r] for r in rows[n]) for n in "ab"}
    slope = np.zeros((D, C))
    for row in rows["a"]:
        p = np.exp(found["a"][row]) - np.eye(C)[batch["label"][row]]
        slope += weights[row] * np.outer(batch["image"][row], p) / sum(weights[r] for r in rows["a"])
    return total, rows, slope


SOME: dict[str, Any] = {
    "mask": np.array([1, 0, 1, 1, 1, 0, 1, 1, 1, 1], np.float32),
    "weight": np.array([1, 9, 2, 0, 1, 3, 0.5, 1, 1, 2], np.float32),
}


@pytest.mark.parametrize("some", [False, True])
def test_each_learns_what_the_other_finds_easiest(some):
    batch = a_batch(**(SOME if some else {}))
    objective = jt.co_teaching([net(), net("b")], forget_rate=0.3, ramp=10)
    count = sum(batch.get("mask", np.ones(B)) * batch.get("weight", np.ones(B)) > 0)
    run = compiled(objective, batch)
    for step, share in ((0, 1.0), (5, 0.85), (10, 0.7), (99, 0.7)):
        value, metrics, slope, params = run(step)
        total, rows, expected = by_hand(params, batch, share)
        np.testing.assert_allclose([metrics["a"], metrics["b"]], [total["a"], total["b"]], rtol=1e-5)
        np.testing.assert_allclose(value, total["a"] + total["b"], rtol=1e-5)
        np.testing.assert_allclose(slope["a"]["w"], expected, rtol=1e-4, atol=1e-6)
        assert metrics["a/kept"] == metrics["b/kept"] == pytest.approx(len(rows["a"]) / count)
        right = np.array([logs(params, "a", batch)[r].argmax() == batch["label"][r] for r in range(B)])
        assert metrics["a/accuracy"] == pytest.approx(right[batch.get("mask", np.ones(B)) > 0].mean())
        assert rows["a"] != rows["b"] or share == 1


def test_the_share_that_is_kept_is_the_papers():
    """R(t) = 1 − τ min((t / T)^c, 1), and at least one example; or a schedule of one's own."""
    how: list[dict[str, Any]] = [
        {"forget_rate": 0.8, "ramp": 10, "exponent": 2.0},
        {"forget_rate": 0.8, "ramp": 10, "exponent": 0.5},
        {"forget_rate": 0.99},
        {"forget_rate": lambda step: 0.1 * step},
    ]
    expected = [0.8, np.floor(10 * (1 - 0.8 * 0.5**0.5)) / 10, 0.1, 0.5]
    for kwargs, share in zip(how, expected, strict=True):
        objective = jt.co_teaching([net(), net("b")], **kwargs)
        assert compiled(objective, a_batch(), gradient=False)(5)[1]["a/kept"] == pytest.approx(share)


def test_with_disagreement_they_choose_where_they_differ():
    batch = a_batch(3, mask=SOME["mask"])
    run = compiled(jt.co_teaching([net(), net("b")], forget_rate=0.5, disagreement=4), batch)
    for step in (3, 4, 9):
        value, metrics, slope, params = run(step)
        total, rows, expected = by_hand(params, batch, 0.5, disagree=step >= 4)
        np.testing.assert_allclose(value, total["a"] + total["b"], rtol=1e-5)
        np.testing.assert_allclose(slope["a"]["w"], expected, rtol=1e-4, atol=1e-6)
        assert metrics["b/kept"] == pytest.approx(len(rows["b"]) / 8)


def test_where_nobody_differs_or_nothing_counts_nothing_is_learned():
    objective = jt.co_teaching([net(), net("b")], forget_rate=0.2, disagreement=0)
    value, metrics, _, _ = compiled(objective, a_batch(), same=True, gradient=False)()
    assert value == metrics["a/kept"] == 0
    empty = a_batch(mask=np.zeros(B, np.float32))
    value, metrics, slope, _ = compiled(jt.co_teaching([net(), net("b")], forget_rate=0.2), empty)()
    assert value == metrics["a/kept"] == 0
    assert not np.any(slope["a"]["w"])


def test_in_evaluation_all_examples_count():
    """And soft labels are labels, under other names."""
    batch = a_batch(mask=SOME["mask"])
    soft = {"x": batch["image"], "y": np.eye(C, dtype=np.float32)[batch["label"]], "mask": SOME["mask"]}
    objective = jt.co_teaching([net(), net("b")], forget_rate=0.6, label="y", view="x")
    value, metrics, _, params = compiled(objective, soft, train=False, gradient=False)()
    total, _, _ = by_hand(params, batch, 1.0)
    np.testing.assert_allclose(value, total["a"] + total["b"], rtol=1e-5)
    assert metrics["a/kept"] == 1


def test_what_has_gone_wrong_is_not_left_out_as_hard():
    batch = a_batch()
    batch["image"][3] = np.nan
    for masked in (False, True):
        seen = batch | ({"mask": np.float32(np.arange(B) != 3)} if masked else {})
        value, _, _, _ = compiled(jt.co_teaching([net(), net("b")], forget_rate=0.5), seen, gradient=False)()
        assert np.isfinite(value) == masked


def test_wrong_labels_are_mostly_left_out():
    """Two linear nets on rows of which 40 % have a wrong label."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, D)).astype(np.float32)
    true = np.argmax(x[:, :C], -1)
    wrong = rng.random(300) < 0.4
    given = np.int32(np.where(wrong, (true + 1) % C, true))
    objective = jt.co_teaching([net(), net("b")], forget_rate=0.4, ramp=50)
    state = jt.init(objective, optax.adam(0.05), KEY, {"image": x, "label": given})
    step, metrics = jt.train_step(objective, optax.adam(0.05)), {}
    for _ in range(150):
        state, metrics = step(state, {"image": x, "label": given})
    loss = -logs(jax.tree.map(np.asarray, state.params), "a", {"image": x})[np.arange(300), given]
    assert float(metrics["a/kept"]) == pytest.approx(0.6)
    assert wrong[np.argsort(loss)[:180]].mean() < 0.2


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path):
    objective = jt.co_teaching([net(), net("b")], forget_rate=0.4, ramp=4)
    data = [a_batch(n) for n in range(6)]
    how: dict[str, Any] = {"key": 0, "progress": False}
    whole = jt.fit(objective, optax.sgd(0.1), data, steps=6, **how)
    jt.fit(objective, optax.sgd(0.1), data[:3], steps=3, save_every=3, out=tmp_path, **how)
    resumed = jt.fit(objective, optax.sgd(0.1), data, steps=6, save_every=3, out=tmp_path, **how)
    for a, b in zip(*map(jax.tree.leaves, (whole.state.params, resumed.state.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_misuse_is_told():
    two = [net(), net("b")]
    for models in ([net()], [net(), net()], [*two, net("c")]):
        with pytest.raises(jt.InputError, match="two models of different names"):
            jt.co_teaching(models, forget_rate=0.2)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(jt.InputError, match="forget_rate must be in"):
            jt.co_teaching(two, forget_rate=rate)
    wrong: list[dict[str, Any]] = [{"ramp": -1}, {"exponent": 0.0}]
    for how in wrong:
        with pytest.raises(jt.InputError, match="ramp must be 0 steps or more, and exponent positive"):
            jt.co_teaching(two, forget_rate=0.2, **how)
    with pytest.raises(jt.InputError, match="a schedule already"):
        jt.co_teaching(two, forget_rate=lambda step: 0.1, ramp=3)
    with pytest.raises(jt.InputError, match=r"the step from which co-teaching\+"):
        jt.co_teaching(two, forget_rate=0.2, disagreement=-1)
    with pytest.raises(jt.InputError, match="the classes of model 'b'; got 2"):
        jt.init(jt.co_teaching([net(), net("b", 2)], forget_rate=0.2), optax.sgd(0.1), KEY, a_batch())
    with pytest.raises(jt.InputError, match="scores"):
        jt.init(jt.co_teaching(two, forget_rate=0.2, output="scores"), optax.sgd(0.1), KEY, a_batch())


def test_places_among_the_rows_of_all_devices(mesh_of):
    """By counting smaller ones, in groups and not; ties stand in the order of the batch, what is no number last."""
    values = np.array([3, 1, 2, 1, np.inf, 0, 2, np.nan], np.float32)
    groups = np.array([0, 1, 0, 1, 1, 0, 0, 1], np.int32)
    key = [(np.inf, 1) if np.isnan(v) else (v, 0) for v in values]
    whole = [sum((key[j], j) < (key[i], i) for j in range(8)) for i in range(8)]
    within = [sum(groups[j] == groups[i] and (key[j], j) < (key[i], i) for j in range(8)) for i in range(8)]

    def places(values, groups, axis=None):
        ctx = jt.Context(axis=axis)
        return ranked(values, ctx), ranked(values, ctx, groups)

    mesh = mesh_of(4)
    rows = jax.sharding.PartitionSpec("data")
    spread = jax.shard_map(
        lambda v, g: places(v, g, "data"),
        mesh=jax.sharding.Mesh(np.asarray(mesh.devices).reshape(-1), ("data",)),
        in_specs=(rows, rows),
        out_specs=(rows, rows),
    )
    for found in (jax.jit(places)(values, groups), jax.jit(spread)(values, groups)):
        assert [list(map(int, one)) for one in found] == [whole, within]
