"""Measures of a representation against loops and scikit-learn."""

import cv2
import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import jaxtransfer as jt
from jaxtransfer.representation import (
    Embedded,
    alignment,
    embed,
    embed_views,
    knn_accuracy,
    linear_probe,
    plot_embedding,
    recall_at_k,
    uniformity,
)


@pytest.fixture
def sets(rng):
    centres = rng.normal(size=(3, 6))

    def make(count):
        labels = rng.integers(0, 3, count).astype(np.int32)
        return Embedded((centres[labels] + 0.9 * rng.normal(size=(count, 6))).astype(np.float32), labels)

    return make(70), make(41)


def test_embed_leaves_padding_out():
    data = jt.data.Dataset.from_arrays(np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1), np.arange(7) % 3)
    model = jt.models.mlp(3, hidden=(5,))
    variables = model.init(jax.random.key(0), data.read([0])["image"])
    found = embed(model, variables, jt.data.eval_batches(data, 4))
    images = data.read(np.arange(7))["image"]
    expected = model.apply(variables, images, train=False, key=None)[0]["features"]
    np.testing.assert_allclose(found.features, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.labels, data.labels)
    with pytest.raises(jt.InputError, match="has no output 'nope'; it has features, logits"):
        embed(model, variables, jt.data.eval_batches(data, 4), tap="nope")


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (10, 0.07), (10, 5.0), (500, 0.5)])
def test_weighted_neighbours(sets, k, temperature, monkeypatch):
    monkeypatch.setattr("jaxtransfer.representation._BLOCK", 16)
    train, test = sets
    unit = lambda x: np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    right = 0
    for query, label in zip(unit(test.features), test.labels, strict=True):
        cosines = unit(train.features) @ query
        votes = np.zeros(3)
        for place in np.argsort(-cosines)[:k]:
            votes[train.labels[place]] += np.exp(cosines[place] / temperature)
        right += votes.argmax() == label
    assert knn_accuracy(train, test, k=k, temperature=temperature) == pytest.approx(right / len(test.labels))


def test_the_probe_is_converged_logistic_regression(sets):
    train, test = sets
    mean, std = train.features.mean(0), train.features.std(0)
    x = (train.features - mean) / std
    expected = LogisticRegression(C=1 / (0.05 * len(x)), max_iter=10_000, tol=1e-8).fit(x, train.labels)
    assert linear_probe(train, test, strengths=[0.05]) == expected.score((test.features - mean) / std, test.labels)
    assert linear_probe(train, test) > 0.5


def test_recall(rng, monkeypatch):
    monkeypatch.setattr("jaxtransfer.representation._BLOCK", 4)
    queries, gallery = rng.normal(size=(9, 3)), rng.normal(size=(8, 3))
    relevant = rng.random((9, 8)) < 0.2
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    order = np.argsort(-(unit(queries) @ unit(gallery).T), axis=1)
    expected = {k: np.mean([relevant[i, order[i, :k]].any() for i in range(9)]) for k in (1, 3, 8)}
    assert recall_at_k(queries, gallery, relevant, ks=(1, 3, 8)) == pytest.approx(expected)
    assert recall_at_k(gallery, gallery + 0.01, np.arange(8), ks=(1,)) == {1: 1.0}
    with pytest.raises(jt.InputError, match="between 1 and the gallery's 8; got"):
        recall_at_k(queries, gallery, relevant, ks=(1, 9))
    with pytest.raises(jt.InputError, match="expected queries"):
        recall_at_k(queries, gallery[:, :2], relevant)


def test_alignment_and_uniformity(rng, monkeypatch):
    monkeypatch.setattr("jaxtransfer.representation._BLOCK", 5)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, 4))
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    assert alignment(x, y) == pytest.approx(np.mean(np.sum((unit(x) - unit(y)) ** 2, 1)), rel=1e-5)
    pairs = [
        np.exp(-3.0 * np.sum((a - b) ** 2)) for i, a in enumerate(unit(x)) for j, b in enumerate(unit(x)) if i != j
    ]
    assert uniformity(x, t=3.0) == pytest.approx(np.log(np.mean(pairs)), rel=1e-4)
    with pytest.raises(jt.InputError, match="of pairs; got 1"):
        uniformity(x[:1])


def test_vectors_of_length_zero_are_spread_over_nothing():
    assert np.isfinite(uniformity(np.zeros((10, 3))))
    x = np.array([[0.0, 0.0], [3.0, 0.0]])  # squared distance of 0 and a unit vector here: 2 − 2·0
    assert uniformity(x) == pytest.approx(-4.0, rel=1e-5)


def test_views_batch_by_batch():
    def shifted(key, batch, rows):
        by = jax.random.normal(key) + rows[:, None, None, None]
        return {**batch, "image": batch["image"] + by, "image2": batch["image"] - by}

    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    model, key = jt.models.mlp(2, hidden=()), jax.random.key(3)
    variables = model.init(key, images)
    batches = [{"image": images[i : i + 4], "label": np.zeros(len(images[i : i + 4]), int)} for i in (0, 4, 8)]
    one, two = embed_views(model, variables, batches, shifted, key=key, tap="logits")
    by = jax.random.normal(key) + np.arange(10)[:, None]
    for found, x in ((one, images[:, 0, 0] + by), (two, images[:, 0, 0] - by)):
        expected = model.apply(variables, np.asarray(x)[:, None, None], train=False, key=None)[0]["logits"]
        np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-5)
        assert len(found.labels) == 10


def test_a_probe_of_few_examples(rng):
    few = Embedded(rng.normal(size=(3, 4)), np.array([0, 1, 1]))
    assert 0 <= linear_probe(few, few) <= 1
    assert linear_probe(Embedded(few.features[:2], few.labels[:2]), few, strengths=(0.1, 1.0)) >= 0


def test_a_picture(sets, tmp_path):
    plot_embedding(sets[0], tmp_path / "plane.png", names=("a", "b", "c"))
    assert cv2.imread(str(tmp_path / "plane.png")).shape[1] > 500


def test_refusals(sets):
    train, test = sets
    with pytest.raises(jt.InputError, match="expected a label for each embedding; got 0 and 70"):
        knn_accuracy(Embedded(train.features, train.labels[:0]), test)
    with pytest.raises(jt.InputError, match="the same dimensions; got 6 and 5"):
        linear_probe(train, Embedded(test.features[:, :5], test.labels))
    with pytest.raises(jt.InputError, match="k of at least 1"):
        knn_accuracy(train, test, k=0)
    with pytest.raises(jt.InputError, match="all 41 training examples are of one"):
        linear_probe(Embedded(test.features, np.ones_like(test.labels)), test)
    with pytest.raises(jt.InputError, match="got 0 queries"):
        recall_at_k(test.features[:0], test.features, np.zeros(0, int))
    with pytest.raises(jt.InputError, match=r"of pairs, \[N, D\] twice; got \(5, 6\) and \(1, 6\)"):
        alignment(test.features[:5], test.features[:1])
    with pytest.raises(jt.InputError, match="a picture needs two embeddings"):
        plot_embedding(Embedded(test.features[:1], test.labels[:1]), "plane.png")
    with pytest.raises(jt.InputError, match="strengths must be positive"):
        linear_probe(train, test, strengths=[0.0])
