"""Scores without target labels: each against its formula in loops, at its edges, and as the monitor of a run."""

import functools
import math
import tracemalloc

import jax
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy as entropy_of
from sklearn.linear_model import LogisticRegression

import jaxtransfer as jt
from jaxtransfer.adaptation import selection

ON_LOGITS = (
    selection.entropy,
    selection.information_maximization,
    selection.bnm,
    selection.snd,
    selection.softmax_correlation,
)


@pytest.fixture
def logits(rng):
    return rng.normal(size=(37, 5)) * 2


def test_entropy_and_mutual_information(logits):
    p = softmax(logits, axis=1)
    mean = sum(entropy_of(row) for row in p) / len(p)
    assert selection.entropy(logits) == pytest.approx(-mean, rel=1e-9)
    assert selection.information_maximization(logits) == pytest.approx(entropy_of(p.mean(axis=0)) - mean, rel=1e-9)


def test_bnm_is_the_nuclear_norm_and_correlation_a_cosine(logits):
    p = softmax(logits, axis=1)
    roots = np.sqrt(np.linalg.eigvalsh(p.T @ p))
    assert selection.bnm(logits) == pytest.approx(roots.sum() / len(p), rel=1e-9)
    correlation = sum(np.outer(row, row) for row in p)
    cosine = 1 - cdist(correlation.reshape(1, -1), np.eye(5).reshape(1, -1), "cosine")[0, 0]
    assert selection.softmax_correlation(logits) == pytest.approx(cosine, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_snd_is_the_entropy_of_each_examples_neighbours(logits, temperature, monkeypatch):
    p = softmax(logits, axis=1)
    found = []
    for i in range(len(p)):
        cosines = np.array([p[i] @ p[j] / np.linalg.norm(p[i]) / np.linalg.norm(p[j]) for j in range(len(p)) if j != i])
        found.append(entropy_of(softmax(cosines / temperature)))
    assert selection.snd(logits, temperature=temperature) == pytest.approx(np.mean(found), rel=1e-9)
    monkeypatch.setattr("jaxtransfer.adaptation.selection.density._ENTRIES", 10 * len(p) + 1)
    assert selection.snd(logits, temperature=temperature) == pytest.approx(np.mean(found), rel=1e-9)


def test_snd_of_many_examples_takes_little_memory(rng):
    logits = rng.normal(size=(4000, 3))
    tracemalloc.start()
    selection.snd(logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000**2 * 8 / 2  # half of the matrix of similarities, of which several are made


def test_what_a_sure_and_an_unsure_model_score():
    sure, unsure, single = 1e4 * np.eye(4), np.zeros((4, 4)), 1e4 * np.eye(4)[[0, 0, 0, 0]]
    assert selection.information_maximization(sure) == pytest.approx(math.log(4))
    assert selection.information_maximization(unsure) == pytest.approx(0, abs=1e-12)
    assert selection.information_maximization(single) == pytest.approx(0, abs=1e-12)
    assert selection.entropy(single) == pytest.approx(0, abs=1e-12)
    assert selection.entropy(unsure) == pytest.approx(-math.log(4))
    assert selection.bnm(sure) == pytest.approx(1)
    assert selection.bnm(single) == pytest.approx(math.sqrt(4) / 4)
    assert selection.softmax_correlation(sure) == pytest.approx(1)
    assert selection.softmax_correlation(single) == pytest.approx(0.5)
    assert selection.snd(unsure) == pytest.approx(math.log(3))  # all are alike
    assert selection.snd(np.zeros((2, 3))) == 0  # a single neighbour


def test_source_accuracy(logits):
    labels = logits.argmax(axis=1)
    labels[:9] = (labels[:9] + 1) % 5
    assert selection.source_accuracy(logits, labels) == pytest.approx(28 / 37)


def test_dev_risk_is_the_weighted_mean_with_its_control_variate(rng):
    losses, weights = rng.exponential(size=50), rng.exponential(size=50)
    weighted = [loss * weight for loss, weight in zip(losses, weights, strict=True)]
    means = sum(weighted) / 50, sum(weights) / 50
    covariance = sum((a - means[0]) * (b - means[1]) for a, b in zip(weighted, weights, strict=True)) / 49
    eta = -covariance / (sum((b - means[1]) ** 2 for b in weights) / 49)
    assert selection.dev_risk(losses, weights) == pytest.approx(means[0] + eta * means[1] - eta, rel=1e-9)
    assert selection.dev_risk(losses, np.ones(50)) == pytest.approx(losses.mean())
    assert selection.dev_risk([0.7], [2.0]) == pytest.approx(1.4)
    for bad in (np.nan, np.inf):
        with pytest.raises(jt.InputError, match="not finite"):
            selection.dev_risk([0.7, bad], [2.0, 1.0])
        with pytest.raises(jt.InputError, match="not finite"):
            selection.dev_risk([0.7, 0.1], [bad, 1.0])


def test_dev_weighs_the_source_as_the_target(rng):
    """Two Gaussians, whose density ratio is known: the risk is that of the target."""
    train, held, target = (rng.normal(loc=mean, size=(4000, 1)) for mean in (0.0, 0.0, 1.0))
    logits = np.hstack([held, np.zeros_like(held)])  # wrong where x is small: cross-entropy log(1 + e^-x)
    labels = np.zeros(len(held), int)
    truth = np.mean(np.log1p(np.exp(-target)))
    plain = np.mean(np.log1p(np.exp(-held)))
    found = [-selection.dev(logits, labels, held, target, train), -selection.dev(logits, labels, held, target)]
    assert found == pytest.approx([truth] * 2, abs=0.03)
    assert abs(plain - truth) > 0.2
    unequal = -selection.dev(logits, labels, held, target[:500], train)  # the domains' sizes take no part
    assert unequal == pytest.approx(truth, abs=0.06)
    x, y = np.concatenate([train, target[:500]]), np.repeat([0, 1], [4000, 500])
    mean, scale = x.mean(), x.std()
    told = (
        LogisticRegression(C=1 / (0.5 * 4500), tol=1e-8).fit((x - mean) / scale, y).predict_proba((held - mean) / scale)
    )
    expected = selection.dev_risk(np.log1p(np.exp(-held[:, 0])), 8 * told[:, 1] / told[:, 0])
    stiff = selection.dev(logits, labels, held, target[:500], train, strength=0.5)
    assert stiff == pytest.approx(-expected, rel=1e-3)


def test_a_distance(rng):
    near, same, far = (rng.normal(loc=mean, size=(300, 4)) for mean in (0.0, 0.0, 9.0))
    assert selection.proxy_a_distance(near, far) == 2
    assert selection.a_distance(near, far[:30]) == -2
    assert selection.proxy_a_distance(near, same) < 0.3
    assert selection.proxy_a_distance(near[:20], same) < 1  # the larger domain's share of all tells nothing
    assert selection.proxy_a_distance(np.ones((5, 3)), np.ones((9, 3))) == 0
    assert selection.proxy_a_distance(near, near) <= 0.3
    shifted = near + 1
    found = {selection.proxy_a_distance(near, shifted, seed=seed) for seed in range(3)}
    assert len(found) > 1
    assert selection.proxy_a_distance(near, shifted, most=40) != selection.proxy_a_distance(near, shifted)
    assert selection.proxy_a_distance(near, shifted, strength=1e5) <= 2
    # a normal shifted by 1 in 4 dimensions: the best linear classifier errs in Φ(−1)
    assert selection.proxy_a_distance(near, shifted) == pytest.approx(2 * (1 - 2 * 0.1587), abs=0.25)


def test_reverse_validation(rng):
    labels, guesses = rng.integers(0, 3, 90), rng.integers(0, 3, 60)
    centres = 8 * np.eye(3)
    source, target = centres[labels] + rng.normal(size=(90, 3)), centres[guesses] + rng.normal(size=(60, 3))
    said = np.eye(3)[guesses]
    assert selection.reverse_validation(source, labels, target, said) > 0.97
    assert selection.reverse_validation(source, (labels + 1) % 3, target, said) < 0.03
    alone = np.eye(3)[np.zeros(60, int)]
    assert selection.reverse_validation(source, labels, target, alone) == np.mean(labels == 0)
    two = np.eye(3)[np.where(guesses == 2, 2, 0)]  # of which one isn't number 1
    assert selection.reverse_validation(source, labels, target, two, strength=1e-1) == pytest.approx(
        np.mean(labels != 1), abs=0.05
    )


@pytest.mark.parametrize("score", ON_LOGITS)
def test_bad_logits_are_one_clear_error(score):
    for bad in (np.zeros(3), np.zeros((0, 3)), np.zeros((3, 1)), np.full((3, 3), np.nan)):
        with pytest.raises(jt.InputError, match="target_logits"):
            score(bad)


def test_bad_arrays_are_one_clear_error(logits):
    with pytest.raises(jt.InputError, match="one of them"):
        selection.snd(logits[:1])
    with pytest.raises(jt.InputError, match="temperature"):
        selection.snd(logits, temperature=0)
    with pytest.raises(jt.InputError, match="class numbers in"):
        selection.source_accuracy(logits, np.full(37, 5))
    with pytest.raises(jt.InputError, match="for each of 37"):
        selection.source_accuracy(logits, np.zeros(36, int))
    with pytest.raises(jt.InputError, match="same dimensions"):
        selection.a_distance(logits, logits[:, :3])
    with pytest.raises(jt.InputError, match="two examples"):
        selection.a_distance(logits, logits[:1])
    with pytest.raises(jt.InputError, match="strength"):
        selection.a_distance(logits, logits, strength=0)
    with pytest.raises(jt.InputError, match=r"losses \[N\]"):
        selection.dev_risk([1.0], [1.0, 2.0])
    with pytest.raises(jt.InputError, match="for each of 37 logits"):
        selection.dev(logits, np.zeros(37, int), logits[:5], logits)
    with pytest.raises(jt.InputError, match="for each of 37 logits"):
        selection.reverse_validation(logits, np.zeros(37, int), logits[:5], logits)


def data(seed, size=50):
    rng = np.random.default_rng(seed)
    return jt.data.Dataset.from_columns(
        features=rng.normal(size=(size, 6)).astype(np.float32), label=np.arange(size) % 3
    )


@pytest.fixture(scope="module")
def model():
    return jt.models.mlp(3, hidden=(4,))


@pytest.mark.slow
def test_scores_are_noted_and_choose_the_checkpoint(tmp_path, model):
    """The best checkpoint is kept by a score of the target's images, and their labels are not read."""
    target = jt.data.eval_batches(data(2), 16)
    unlabelled = [{name: column for name, column in batch.items() if name != "label"} for batch in target]
    warm = functools.partial(selection.snd, temperature=0.3)
    scores = {
        "warm": warm,
        "im": selection.information_maximization,
        "dev": selection.dev,
        "own": lambda train_labels: 7,
    }
    given = {"source": jt.data.eval_batches(data(1), 16), "train": jt.data.eval_batches(data(0), 16)}
    watch = selection.watched(model, scores, target=unlabelled, **given, view="features")
    fitted = jt.fit(
        jt.classification(model, view="features"),
        optax.adam(0.05),
        jt.data.pipeline(data(0), 16),
        steps=6,
        measure=watch,
        measure_every=2,
        monitor="warm",
        out=tmp_path / "run",
        progress=False,
    )
    records = [record for record in fitted.history if "eval/warm" in record]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(record["eval/own"] == 7 for record in records)
    assert fitted.best == max(records, key=lambda record: record["eval/warm"])
    params, own = fitted.state.params[model.name], target.dataset
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x, train=False, key=None)[0]["logits"])
    logits = np.asarray(apply(params, own.read(np.arange(50))["features"]))
    assert records[-1]["eval/im"] == pytest.approx(selection.information_maximization(logits), rel=1e-5)
    assert records[-1]["eval/warm"] == pytest.approx(selection.snd(logits, temperature=0.3), rel=1e-5)


def test_what_a_watch_cannot_do_is_said(model):
    batches = jt.data.eval_batches(data(0), 16)
    with pytest.raises(jt.InputError, match="'source_accuracy' reads source_logits; pass source="):
        selection.watched(model, [selection.source_accuracy], target=batches)
    with pytest.raises(jt.InputError, match="wants 'colour'"):
        selection.watched(model, {"odd": lambda colour: 0}, target=batches)
    with pytest.raises(jt.InputError, match="without a name"):
        selection.watched(model, [lambda target_logits: 0], target=batches)
    with pytest.raises(jt.InputError, match="functions of arrays"):
        selection.watched(model, {"snd": "snd"}, target=batches)
    blind = [{"features": np.zeros((4, 6), np.float32)}]
    watch = selection.watched(model, [selection.source_accuracy], source=blind, view="features")
    state = jt.init(jt.classification(model, view="features"), optax.sgd(0.1), jax.random.key(0), batches.batch(0))
    with pytest.raises(jt.InputError, match="have no 'label'"):
        watch(state)
    with pytest.raises(jt.InputError, match="no model"):
        selection.watched(model.named("other"), [selection.entropy], target=blind, view="features")(state)
    with pytest.raises(jt.InputError, match="at least one example"):
        selection.watched(model, [selection.entropy], target=[], view="features")(state)
