"""Measures of a representation against loops and scikit-learn."""

import logging
import subprocess
import sys

import cv2
import jax
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

import jaxtransfer as jt
from jaxtransfer.representation import (
    Embedded,
    alignment,
    blocks,
    embed,
    embed_views,
    embedder,
    knn_accuracy,
    linear_probe,
    neighbours,
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
    monkeypatch.setattr("jaxtransfer.representation.blocks._BLOCK", 16)
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
    monkeypatch.setattr("jaxtransfer.representation.blocks._BLOCK", 4)
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
    monkeypatch.setattr("jaxtransfer.representation.blocks._BLOCK", 5)
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


@pytest.mark.slow
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


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_scores_nan(sets, poison):
    for train, test in ((_poisoned(sets[0], poison), sets[1]), (sets[0], _poisoned(sets[1], poison))):
        assert np.isnan(knn_accuracy(train, test))
        assert np.isnan(linear_probe(train, test))
        found = recall_at_k(test.features, train.features, np.zeros(len(test.features), int), ks=(1, 5))
        assert found.keys() == {1, 5}
        assert np.isnan(list(found.values())).all()
        assert np.isnan(alignment(train.features[:30], test.features[:30]))
    assert np.isnan(uniformity(_poisoned(sets[0], poison).features))


def _poisoned(embedded, value):
    features = embedded.features.copy()
    features[3, 2] = value
    return Embedded(features, embedded.labels)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_cosine_knows_no_scale(sets, scale):
    plain = [knn_accuracy(*sets, k=5), alignment(sets[0].features[:9], sets[1].features[:9])]
    train, test = (Embedded(np.float32(one.features * scale), one.labels) for one in sets)
    assert [knn_accuracy(train, test, k=5), alignment(train.features[:9], test.features[:9])] == pytest.approx(plain)
    assert uniformity(train.features) == pytest.approx(uniformity(sets[0].features), rel=1e-5)


def test_neighbours_of_many_classes_in_blocks_of_the_bank(rng, monkeypatch):
    monkeypatch.setattr("jaxtransfer.representation.blocks._BANK_BLOCK", 64)
    bank = Embedded(rng.normal(size=(300, 5)).astype(np.float32), rng.integers(0, 40, 300) * 1000)
    test = Embedded(rng.normal(size=(50, 5)).astype(np.float32), rng.integers(0, 40, 50) * 1000)
    unit = lambda x: np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    cosines = unit(test.features) @ unit(bank.features).T
    guesses = []
    for row in cosines:
        near = np.argsort(-row)[:30]
        guesses.append(np.bincount(bank.labels[near], np.exp(row[near] / 0.5)).argmax())
    for test_labels in (test.labels, np.array(guesses)):  # all right where the labels are what the reference says
        found = knn_accuracy(bank, Embedded(test.features, test_labels), k=30, temperature=0.5)
        assert found == np.mean(np.array(guesses) == test_labels)


def test_equal_votes_go_to_the_first_class():
    bank = Embedded(np.array([[1.0, 0], [1, 0], [0, 1]]), np.array([7, 4, 9]))
    assert knn_accuracy(bank, Embedded(np.array([[1.0, 0]]), np.array([4])), k=2) == 1


@pytest.mark.slow
def test_votes_take_no_memory_per_class():
    """In a process of its own, whose peak is this call's: 1,024 queries, 200 neighbours, 10,000 classes."""
    code = """
import resource
import numpy as np
import optax
from jaxtransfer.representation import Embedded, knn_accuracy
rng = np.random.default_rng(0)
sets = [Embedded(rng.normal(size=(n, 8)).astype(np.float32), rng.integers(0, 10_000, n)) for n in (3000, 1024)]
knn_accuracy(*(Embedded(one.features, one.labels % 5) for one in sets), k=3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
knn_accuracy(*sets)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150  # MiB; a table [1024, 10000] of float32 is 39, one for each neighbour 7,800


def test_the_program_of_the_votes_is_bounded(rng):
    """1,024 queries by 8,192 vectors of a bank at a time are 34 MB; a bank twice as long takes no more."""
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    bounds = []
    for count in (2, 4):
        labels = jax.ShapeDtypeStruct((count, 8192), np.int32)
        program = blocks.voted.lower(floats(1024, 8), floats(count, 8192, 8), labels, floats(), k=200).compile()
        bounds.append(program.memory_analysis().temp_size_in_bytes / 2**20)
    assert bounds[0] == pytest.approx(bounds[1], rel=0.01)
    assert bounds[0] < 150


def test_neighbours_compile_once_per_shape(sets, caplog):
    sets = [
        Embedded(np.tile(one.features, (2, 1)), np.tile(one.labels, 2)) for one in sets
    ]  # shapes of this test alone
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        for temperature, classes in ((0.07, 3), (0.1, 3), (0.1, 50)):
            more = [Embedded(one.features + temperature, one.labels + classes) for one in sets]
            knn_accuracy(*more, k=5, temperature=temperature)
        compiled = [record for record in caplog.messages if record.startswith("Compiling jit(voted)")]
        assert len(compiled) == 1, caplog.messages
        knn_accuracy(*sets, k=6)
        assert sum(record.startswith("Compiling jit(voted)") for record in caplog.messages) == 2


def test_an_embedder_compiles_once(rng):
    traced, net = [], jt.models.mlp(3, hidden=(5,))

    def apply(variables, inputs, *, train, key):
        traced.append(inputs.shape)
        return net.apply(variables, inputs, train=train, key=key)

    images = rng.integers(0, 256, (9, 4, 4, 1), dtype=np.uint8)
    batches = jt.data.eval_batches(jt.data.Dataset.from_arrays(images, np.arange(9) % 3), 4)
    run = embedder(jt.Model(net.init, apply))
    for seed in range(3):
        run(net.init(jax.random.key(seed), images), batches)
    assert traced == [(4, 4, 4, 1)]


def test_labels_that_are_no_class_numbers_are_refused(sets):
    train, test = sets
    for labels in (train.labels.astype(str), train.labels + 0.5, train.labels - 1):
        with pytest.raises(jt.InputError, match="labels are class numbers"):
            knn_accuracy(Embedded(train.features, labels), test)


@pytest.mark.slow
def test_neighbours_in_training_compile_once(rng, caplog):
    images = rng.integers(0, 256, (40, 3, 3, 1), dtype=np.uint8)
    data = jt.data.Dataset.from_arrays(images, images[:, 0, 0, 0] // 128)
    net, batches = jt.models.mlp(2, hidden=(5,)), jt.data.eval_batches(data, 16)
    measure, measured = neighbours(net, batches, batches, k=3), []

    def noted(state):
        with caplog.at_level(logging.WARNING, logger="jax"), jax.log_compiles():
            measured.append(measure(state)["knn_accuracy"])
        return {"knn_accuracy": measured[-1]}

    fitted = jt.fit(
        jt.classification(net),
        optax.adam(1e-2),
        jt.data.pipeline(data, 16),
        steps=8,
        measure=noted,
        measure_every=2,
        monitor="knn_accuracy",
        mesh=jax.make_mesh((8,), ("data",)),
    )
    assert [r["eval/knn_accuracy"] for r in fitted.history if "eval/knn_accuracy" in r] == measured
    assert fitted.best["eval/knn_accuracy"] == max(measured)
    for name in ("voted", "compiled"):
        assert sum(message.startswith(f"Compiling jit({name})") for message in caplog.messages) == 1, name
    variables = {"params": fitted.state.params["model"]}
    whole = embed(net, jax.device_get(variables), batches)
    assert measured[-1] == knn_accuracy(whole, whole, k=3)


@pytest.mark.parametrize("features", [np.ones(6), np.ones((6, 2, 2)), np.array([["a"]] * 6)])
def test_embeddings_of_another_rank_are_refused(features):
    labels = np.arange(6) % 2
    one, other = Embedded(features, labels), Embedded(np.ones((6, 2)), labels)
    for score in (knn_accuracy, linear_probe):
        for pair in ((one, other), (other, one)):
            with pytest.raises(jt.InputError, match=r"expected embeddings, numbers \[N, D\]; got"):
                score(*pair)
