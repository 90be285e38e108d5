"""Scores of classifiers against scikit-learn and loops: padding, classes that don't occur, huge logits."""

import cv2
import numpy as np
import pytest
import sklearn.metrics as sk

import jaxtransfer as jt


def softmax(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def calibration_error(probabilities, labels, bins):
    """ECE and MCE by a loop over bins (low, high]."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total, gaps = 0.0, []
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            gaps.append(abs(right[inside].mean() - confidence[inside].mean()))
            total += inside.mean() * gaps[-1]
    return total, max(gaps)


@pytest.fixture
def predictions(rng):
    """Logits of 7 classes with ties; class 2 has no examples, class 5 is never predicted."""
    logits = rng.integers(-3, 4, (90, 7)).astype(np.float32) * 0.7
    logits[:, 5] = -4
    labels = rng.choice([0, 1, 3, 4, 5, 6], 90).astype(np.int32)
    return logits, labels


@pytest.mark.parametrize(("bins", "top"), [(15, (5,)), (4, (2, 3))])
def test_against_scikit_learn(predictions, bins, top):
    logits, labels = predictions
    got = jt.measures.class_scores(logits, labels, bins=bins, top=top)
    probabilities, guesses = softmax(logits), logits.argmax(axis=1)
    np.testing.assert_array_equal(got.confusion, sk.confusion_matrix(labels, guesses, labels=range(7)))
    np.testing.assert_array_equal(got.support, np.bincount(labels, minlength=7))
    recall, precision, f1 = (
        score(labels, guesses, labels=range(7), average=None, zero_division=np.nan)
        for score in (sk.recall_score, sk.precision_score, sk.f1_score)
    )
    np.testing.assert_allclose(got.recall, recall)
    np.testing.assert_allclose(got.precision, precision)
    np.testing.assert_allclose(got.f1, f1)
    assert np.isnan(got.recall[2])
    assert np.isnan(got.precision[5])
    assert got.f1[5] == 0
    ece, mce = calibration_error(probabilities, labels, bins)
    ranks = (logits > logits[np.arange(90), labels][:, None]).sum(axis=1) + [
        sum(row[:y] == row[y]) for row, y in zip(logits, labels, strict=True)
    ]
    expected = {
        "accuracy": sk.accuracy_score(labels, guesses),
        **{f"top{k}": np.mean(ranks < k) for k in top},
        "balanced_accuracy": np.mean(recall[[0, 1, 3, 4, 5, 6]]),
        "macro_f1": np.nanmean(f1),
        "nll": sk.log_loss(labels, probabilities, labels=range(7)),
        "brier": np.mean([((p - np.eye(7)[y]) ** 2).sum() for p, y in zip(probabilities, labels, strict=True)]),
        "ece": ece,
    }
    assert got.summary() == pytest.approx(expected, rel=1e-5)
    assert got.reliability.mce == pytest.approx(mce, rel=1e-5)
    assert got.reliability.count.sum() == got.examples == 90
    assert "90 examples, 7 classes" in repr(got)


def test_rows_that_the_mask_leaves_out_are_not_there(predictions):
    logits, labels = predictions
    mask = np.r_[np.ones(60), np.zeros(30)]
    poisoned, wrong = logits.copy(), labels.copy()
    poisoned[60:], wrong[60:] = np.nan, -1
    got = jt.measures.class_scores(poisoned, wrong, mask=mask)
    want = jt.measures.class_scores(logits[:60], labels[:60])
    assert got.examples == 60
    assert got.summary() == pytest.approx(want.summary(), rel=1e-6)
    np.testing.assert_array_equal(got.confusion, want.confusion)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities)
    got = jt.measures.class_scores(logits.astype(np.float32), [0, 1, 0, 0], bins=4)
    np.testing.assert_array_equal(got.reliability.count, [0, 1, 2, 1])
    assert got.ece == pytest.approx(0.25 * 0.5 + 0.5 * 0.25)
    assert got.reliability.mce == pytest.approx(0.5)


def test_what_is_degenerate():
    one = jt.measures.class_scores(np.zeros((3, 1), np.float32), [0, 0, 0])
    assert one.summary() == pytest.approx(
        {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1, "nll": 0, "brier": 0, "ece": 0}
    )
    huge = jt.measures.class_scores(np.array([[1e30, -1e30], [-np.inf, 0]], np.float32), [0, 0])
    assert (huge.accuracy, huge.brier, huge.nll) == (0.5, 1.0, np.inf)
    soft = jt.measures.class_scores(np.eye(3, dtype=np.float32), np.array([[0.6, 0.4, 0], [0, 0, 1], [0, 0.1, 0.9]]))
    np.testing.assert_array_equal(soft.support, [1, 0, 2])


@pytest.mark.parametrize(
    ("logits", "labels", "options", "told"),
    [
        (np.zeros((0, 3), np.float32), np.zeros(0, np.int32), {}, "no example counts"),
        (np.zeros((2, 3), np.float32), [0, 1], {"mask": [0, 0]}, "no example counts"),
        ([[0.0, np.nan], [0.0, 1.0]], [0, 1], {}, "logits of 1 of 2 examples are not finite"),
        ([[0.0, np.inf], [0.0, 1.0]], [0, 1], {}, "logits of 1 of 2 examples are not finite"),
        ([[0.0, 1.0], [0.0, 1.0]], [2, -1], {}, "2 of 2 labels are none of the 2 classes"),
        ([[0.0, 1.0]], [0, 1], {}, "labels must be integers"),
        ([[0.0, 1.0]], [0], {"mask": [1, 1]}, "mask must have one entry per example"),
        ([[0.0, 1.0]], [0], {"mask": [-1]}, "finite and not negative"),
        ([[0.0, 1.0]], [0], {"bins": 0}, "bins must be"),
        ([[0.0, 1.0]], [0], {"top": 5}, "top must be"),
    ],
)
def test_what_means_nothing_is_refused(logits, labels, options, told):
    with pytest.raises(jt.InputError, match=told):
        jt.measures.class_scores(np.asarray(logits, np.float32), np.asarray(labels), **options)


def test_pictures(predictions, tmp_path):
    scores = jt.measures.class_scores(*predictions)
    jt.measures.plot_confusion(scores, tmp_path / "confusion.png", names=["a $name", "of", "a" * 60])
    jt.measures.plot_reliability(scores, tmp_path / "reliability.png")
    for name in ("confusion", "reliability"):
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        assert picture.std() > 5
