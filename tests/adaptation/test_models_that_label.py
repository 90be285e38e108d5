"""Co-training and tri-training: what models teach one another on unlabelled examples, against loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtransfer as jt
from tests.adaptation.two_domains import softmax
from tests.contract import assert_same_on_any_devices

KEY, B, M, D, C = jax.random.key(6), 6, 9, 4, 3
MASK = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], np.float32)


def net(name="a", classes=C):
    def init(key, x):
        return {"params": {"w": 2 * jax.random.normal(key, (D, classes))}}

    return jt.Model(init, lambda v, x, *, train, key: ({"logits": x @ v["params"]["w"]}, {}), name)


def a_batch(seed=0, masked=True) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def views(rows):
        return {view: np.float32(rng.normal(size=(rows, D))) for view in ("image", "image2")}

    source = {**views(B), "label": np.int32(rng.integers(0, C, B)), "index": np.int32(rng.permutation(B))}
    return {"source": source, "target": {**views(M), **({"mask": MASK} if masked else {})}}


def value_of(objective, batch, **how):
    """Value, metrics, gradient, and the params and state that they are of."""
    params, state = objective.init(KEY, batch)

    @jax.jit
    def run(params, batch):
        def total(params):
            value, _, metrics = objective(params, state, batch, jt.Context(step=jnp.int32(1), key=KEY, **how))
            return value, metrics

        return jax.value_and_grad(total, has_aux=True)(params)

    (value, metrics), slope = run(params, batch)
    return float(value), {name: float(one.value) for name, one in metrics.items()}, slope, (params, state)


def logits(params, name, batch, view="image"):
    return np.asarray(batch[view], float) @ np.asarray(params[name]["w"], float)


def supervised(params, name, batch, view, weights):
    p = softmax(logits(params, name, batch, view))
    return -sum(w * np.log(p[r, batch["label"][r]]) for r, w in enumerate(weights)) / sum(weights)


def taught(p, labels, keep, mask):
    """Σ 1[kept] CE / Σ mask, its gradient in the logits, and the share that is kept."""
    value, slope, count = 0.0, np.zeros_like(p), 0
    for row in range(len(p)):
        if keep[row] and mask[row] > 0:
            value -= np.log(p[row, labels[row]]) / mask.sum()
            slope[row] = (p[row] - np.eye(C)[labels[row]]) / mask.sum()
            count += 1
    return value, slope, count / mask.sum()


def surest(p, most, mask):
    """For each class the `most` rows that it is surest of, by sorting."""
    keep = np.zeros(len(p), bool)
    for c in range(C):
        rows = [r for r in range(len(p)) if mask[r] > 0 and p[r].argmax() == c]
        keep[sorted(rows, key=lambda r: -p[r].max())[: most[c]]] = True
    return keep


@pytest.mark.parametrize(
    ("threshold", "per_class", "masked"), [(0.7, None, True), (0.0, (1, 3, 2), False), (0.6, 1, True)]
)
def test_co_training_teaches_what_the_other_view_is_sure_of(threshold, per_class, masked):
    batch = a_batch(masked=masked)
    mask = MASK if masked else np.ones(M)
    objective = jt.co_training([net(), net("b")], threshold=threshold, per_class=per_class, weight=0.7)
    value, metrics, slope, (params, _) = value_of(objective, batch)
    views, total, shares = {"a": "image", "b": "image2"}, 0.0, []
    found = {name: softmax(logits(params, name, batch["target"], view)) for name, view in views.items()}
    for name, other in (("a", "b"), ("b", "a")):
        keep = found[other].max(1) >= threshold
        if per_class is not None:
            keep &= surest(found[other], np.broadcast_to(per_class, C), mask)
        own, by_logits, share = taught(found[name], found[other].argmax(1), keep, mask)
        labelled = supervised(params, name, batch["source"], views[name], np.ones(B))
        total, shares = total + labelled + 0.7 * own, [*shares, share]
        assert metrics[f"{name}/co_training"] == pytest.approx(own, rel=1e-5)
        assert metrics[f"{name}/co_training/kept"] == pytest.approx(share)
        assert metrics[f"source/{name}"] == pytest.approx(labelled, rel=1e-5)
        same = (found[name].argmax(1) == found[other].argmax(1))[mask > 0].mean()
        assert metrics[f"{name}/co_training/agreement"] == pytest.approx(same)
        x, y = batch["source"][views[name]], np.eye(C)[batch["source"]["label"]]
        expected = x.T @ (softmax(logits(params, name, batch["source"], views[name])) - y) / B
        expected = expected + 0.7 * batch["target"][views[name]].T @ by_logits
        np.testing.assert_allclose(slope[name]["w"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert any(0 < share < 1 for share in shares)


@pytest.mark.parametrize(("threshold", "disagreement"), [(0.0, False), (0.6, False), (0.5, True)])
def test_tri_training_teaches_what_two_agree_on(threshold, disagreement):
    batch = a_batch(4)
    models = [net(name) for name in "abc"]
    objective = jt.tri_training(models, threshold=threshold, disagreement=disagreement, weight=lambda step: 0.5 * step)
    value, metrics, slope, (params, _) = value_of(objective, batch)
    found = {name: softmax(logits(params, name, batch["target"])) for name in "abc"}
    total, kept = 0.0, 0
    for name in "abc":
        j, k = (found[other] for other in "abc" if other != name)
        keep = (j.argmax(1) == k.argmax(1)) & (np.minimum(j.max(1), k.max(1)) >= threshold)
        if disagreement:
            keep &= found[name].argmax(1) != j.argmax(1)
        own, by_logits, share = taught(found[name], j.argmax(1), keep, MASK)
        total, kept = total + supervised(params, name, batch["source"], "image", np.ones(B)) + 0.5 * own, kept + share
        assert metrics[f"{name}/tri_training"] == pytest.approx(own, rel=1e-5)
        assert metrics[f"{name}/tri_training/kept"] == pytest.approx(share)
        x, y = batch["source"]["image"], np.eye(C)[batch["source"]["label"]]
        expected = x.T @ (softmax(logits(params, name, batch["source"])) - y) / B
        np.testing.assert_allclose(
            slope[name]["w"], expected + 0.5 * batch["target"]["image"].T @ by_logits, rtol=1e-4, atol=1e-6
        )
    np.testing.assert_allclose(value, total, rtol=1e-5)
    assert 0 < kept < 3


@pytest.mark.slow
def test_each_of_three_learns_from_a_sample_of_its_own():
    batch = a_batch()
    batch["source"]["weight"] = np.array([1, 2, 1, 1, 0.5, 1], np.float32)
    batch["source"]["mask"] = np.array([1, 1, 1, 1, 1, 0], np.float32)
    objective = jt.tri_training([net(name) for name in "abc"], bootstrap=B, threshold=1.0)
    value, metrics, _, (params, state) = value_of(objective, batch)
    counts = {name: np.asarray(state[f"{name}_bootstrap"]["counts"]) for name in "abc"}
    assert all(sum(own) == B and np.all(own == np.round(own)) for own in counts.values())
    assert len({tuple(own) for own in counts.values()}) == 3
    weights = batch["source"]["weight"] * batch["source"]["mask"]
    expected = [
        supervised(params, n, batch["source"], "image", weights * counts[n][batch["source"]["index"]]) for n in "abc"
    ]
    np.testing.assert_allclose([metrics[f"source/{n}"] for n in "abc"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, sum(expected), rtol=1e-5)
    _, plain, _, _ = value_of(objective, batch, train=False)  # evaluation knows no samples
    assert plain["source/a"] == pytest.approx(supervised(params, "a", batch["source"], "image", weights), rel=1e-5)
    for wrong in (B, -1):  # a number beyond the sample in a later batch
        later = jax.tree.map(np.array, batch)
        later["source"]["index"][0] = wrong
        bad, _, _ = objective(params, state, later, jt.Context(step=jnp.int32(1), key=KEY))
        assert np.isnan(float(bad))


ROWS = {
    "co-training": lambda model: jt.co_training(
        [model, model.named("b")], threshold=0.3, per_class=(2, 1, 3, 1), weight=0.5
    ),
    "tri-training": lambda model: jt.tri_training(
        [model, model.named("b"), model.named("c")], bootstrap=16, threshold=0.25
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("co-training", marks=pytest.mark.slow), "tri-training"])
def test_the_same_on_any_devices(name, mesh_of):
    """The rank within a class is of the global batch; a sample is the same everywhere."""
    ended = assert_same_on_any_devices(ROWS[name], mesh_of)
    kept = [float(leaf) for path, leaf in ended.items() if path.endswith("kept")]
    assert all(0 < share <= 1 for share in kept)


@pytest.mark.slow
def test_a_run_with_samples_is_resumed_with_the_same_bits(tmp_path):
    objective = jt.tri_training([net(name) for name in "abc"], bootstrap=B)
    data = [a_batch(n) for n in range(4)]
    how: dict[str, Any] = {"key": 0, "progress": False}
    whole = jt.fit(objective, optax.sgd(0.1), data, steps=4, **how)
    jt.fit(objective, optax.sgd(0.1), data[:2], steps=2, save_every=2, out=tmp_path, **how)
    resumed = jt.fit(objective, optax.sgd(0.1), data, steps=4, save_every=2, out=tmp_path, **how)
    ended = [jax.tree.leaves((run.state.params, run.state.state)) for run in (whole, resumed)]
    for a, b in zip(*ended, strict=True):
        np.testing.assert_array_equal(a, b)


def test_misuse_is_told():
    for models in ([net()], [net(), net()], [net(), net("b"), net("c")]):
        with pytest.raises(jt.InputError, match="co-training needs 2 models of different names"):
            jt.co_training(models)
    with pytest.raises(jt.InputError, match="tri-training needs 3 models of different names"):
        jt.tri_training([net(), net("b"), net("b")])
    two, three = [net(), net("b")], [net(), net("b"), net("c")]
    with pytest.raises(jt.InputError, match="a view for each of its two models"):
        jt.co_training(two, views=("image",))  # pyright: ignore[reportArgumentType]
    for most in (0, 1.5, (1, 0, 2), [[1]]):
        with pytest.raises(jt.InputError, match="per_class must be a number of examples"):
            jt.co_training(two, per_class=most)  # pyright: ignore[reportArgumentType]
    for make in (lambda **how: jt.co_training(two, **how), lambda **how: jt.tri_training(three, **how)):
        with pytest.raises(jt.InputError, match="threshold must be"):
            make(threshold=1.5)
    with pytest.raises(jt.InputError, match="bootstrap must be the number of labelled examples"):
        jt.tri_training(three, bootstrap=0)
    for objective, told in (
        (jt.co_training(two, per_class=(1, 2)), "per_class has 2 numbers, the models 3 classes"),
        (jt.co_training([net(), net("b", 4)]), "must have the same classes"),
        (jt.tri_training([*two, net("c", 4)]), "must have the same classes"),
        (jt.tri_training(three, bootstrap=B - 1), r"index must be in \[0, 5\)"),
        (jt.co_training(two, source="labelled"), "labelled"),
    ):
        with pytest.raises(jt.InputError, match=told):
            jt.init(objective, optax.sgd(0.1), KEY, a_batch())
    without = a_batch()
    del without["source"]["index"]
    with pytest.raises(jt.InputError, match=r"batch\['source'\]\['index'\]"):
        jt.init(jt.tri_training(three, bootstrap=B), optax.sgd(0.1), KEY, without)
