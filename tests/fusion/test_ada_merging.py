"""AdaMerging: a model of coefficients, their entropy objective; and batch statistics that belong to fused weights."""

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fusion_trees import assert_close, flat

import jaxtransfer as jt

F = jt.fusion
RNG = np.random.default_rng(0)
MODEL = jt.models.mlp(3, hidden=(5,))


def near(tree, size=0.3):
    def moved(leaf):
        return (leaf + size * RNG.normal(size=leaf.shape)).astype(leaf.dtype)

    return {"params": jax.tree.map(moved, tree["params"]), **{k: v for k, v in tree.items() if k != "params"}}


BASE = jax.tree.map(np.asarray, MODEL.init(jax.random.key(0), jnp.zeros((1, 4))))
MODELS = [near(BASE, 1.0), near(BASE, 1.0)]
BATCH = {"image": RNG.normal(size=(6, 4)).astype(np.float32), "mask": np.array([1, 1, 1, 1, 1, 0], np.float32)}


def entropy(params, image):
    hidden = np.maximum(image @ params["stage1"]["kernel"] + params["stage1"]["bias"], 0)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.mean(-np.sum(p * np.log(p), axis=1)))


@pytest.mark.parametrize("by_leaf", [True, False])
def test_the_value_and_the_gradient(by_leaf):
    merger = F.merger(MODEL, BASE, MODELS, by_leaf=by_leaf, start=0.4)
    objective = F.ada_merging(merger.model)
    optimizer = optax.sgd(0.1)
    batch = {**BATCH, "image": np.where(BATCH["mask"][:, None] > 0, BATCH["image"], 100).astype(np.float32)}
    state = jt.init(objective, optimizer, jax.random.key(0), batch)
    assert jt.tree.count(state.params) == (2 * 4 if by_leaf else 2)
    assert_close(merger.variables(state), F.task_arithmetic(BASE, MODELS, scale=0.4))
    step = jt.train_step(objective, optimizer)
    before = jax.tree.map(np.array, state.params["merged"]["coefficients"])
    state, metrics = step(state, batch)

    def value(coefficients):
        merged = {}
        for path, start in flat(BASE["params"]).items():
            own = flat(coefficients)[path] if by_leaf else coefficients
            away = [flat(model["params"])[path].astype(np.float64) - start for model in MODELS]
            merged[path] = start + sum(share * one for share, one in zip(own, away, strict=True))
        return entropy(jt.tree.nested(merged), BATCH["image"][:5].astype(np.float64))

    start = jax.tree.map(lambda leaf: leaf.astype(np.float64), before)
    assert float(metrics["ada_merging"]) == pytest.approx(value(start), rel=1e-5)
    leaves, structure = jax.tree.flatten(start)
    after = jax.tree.leaves(state.params["merged"]["coefficients"])
    for number, leaf in enumerate(leaves):
        for entry in range(2):
            high, low = (
                value(jax.tree.unflatten(structure, [
                    one + sign * 1e-5 * (np.arange(2) == entry) * (n == number) for n, one in enumerate(leaves)
                ]))
                for sign in (1, -1)
            )  # fmt: skip
            gradient = (high - low) / 2e-5
            assert (leaf[entry] - float(after[number][entry])) / 0.1 == pytest.approx(gradient, abs=2e-4)


def test_training_makes_it_surer_and_stays_within_bounds():
    merger = F.merger(MODEL, BASE, MODELS, clamp=True)
    objective = F.ada_merging(merger.model).on("a") + F.ada_merging(merger.model).on("b")
    data = {"a": BATCH, "b": {"image": BATCH["image"] + 1}}
    fitted = jt.fit(objective, optax.adam(0.1), [data] * 30, steps=30, progress=False)
    merged = merger.variables(fitted.state)
    first = F.task_arithmetic(BASE, MODELS, scale=0.3)
    rows = BATCH["image"][:5]
    assert entropy(jax.tree.map(np.asarray, merged["params"]), rows) < entropy(first["params"], rows)
    for path, leaf in flat(jax.tree.map(np.asarray, merged["params"])).items():
        away = [flat(model["params"])[path] - flat(BASE["params"])[path] for model in MODELS]
        within = sum(np.abs(one) for one in away)
        assert np.all(np.abs(leaf - flat(BASE["params"])[path]) <= within + 1e-5)
    free = F.merger(MODEL, BASE, MODELS, start=2.0, clamp=False)
    state = jt.init(F.ada_merging(free.model), optax.sgd(1.0), jax.random.key(0), BATCH)
    assert_close(free.variables(state), F.task_arithmetic(BASE, MODELS, scale=2.0))


@pytest.mark.slow
def test_on_any_devices(mesh_of):
    def make(model):
        base = jax.tree.map(np.asarray, model.init(jax.random.key(0), np.zeros((1, 4, 4, 1), np.float32)))
        merged = F.merger(model, base, [near(base), near(base)]).model
        return F.ada_merging(merged).on("source") + F.ada_merging(merged).on("target")

    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state
    ended = contract.assert_same_on_any_devices(make, mesh_of)
    assert any(path.endswith("batch_stats/mean") for path in ended)


def test_half_precision_and_counters():
    model = jt.Model(
        lambda key, inputs: {},
        lambda variables, inputs, *, train, key: ({"logits": inputs * variables["params"]["w"][None]}, {}),
    )
    base = {"params": {"w": jnp.ones(3, jnp.bfloat16), "n": jnp.asarray(4)}}
    other = {"params": {"w": jnp.full(3, 3, jnp.bfloat16), "n": jnp.asarray(9)}}
    merger = F.merger(model, base, [other], start=0.5)
    state = jt.init(F.ada_merging(merger.model), optax.sgd(0.1), jax.random.key(0), {"image": jnp.ones((2, 3))})
    found = merger.variables(state)["params"]
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found["w"], np.float32), 2)
    assert found["n"] == 4


def test_merger_refuses():
    with pytest.raises(jt.InputError, match="one model or more"):
        F.merger(MODEL, BASE, [])
    with pytest.raises(jt.InputError, match="the base and model 1 differ"):
        F.merger(MODEL, BASE, [BASE, {"params": {}}])
    with pytest.raises(jt.InputError, match="takes variables"):
        F.merger(MODEL, BASE["params"], [BASE["params"]])
    with pytest.raises(jt.InputError, match="the base has NaN or inf"):
        F.merger(MODEL, jax.tree.map(lambda leaf: leaf * np.nan, BASE), [BASE])


def test_statistics_are_renewed_where_there_are_any():
    assert F.renewed(MODEL, BASE, iter([])) == BASE
    model = jt.models.small_cnn(3, width=2)
    one, two = (model.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1))) for seed in (0, 1))
    batches = [{"image": RNG.normal(size=(4, 8, 8, 1)).astype(np.float32)} for _ in range(2)]
    fused = F.average([one, two])
    found = F.renewed(model, fused, batches)
    expected = jt.recompute_statistics(model, fused, batches)
    assert_close(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected), atol=0)
