"""Average precision, AUROC and the scores of labels against scikit-learn: ties, labels without positives, padding."""

import numpy as np
import pytest
import sklearn.metrics as sk

import jaxtransfer as jt


@pytest.fixture
def answers(rng):
    """Scores of 5 labels in steps, so that many tie; label 3 has no positives, label 4 has nothing else."""
    scores = rng.integers(-6, 7, (80, 5)) / 4
    targets = (rng.random((80, 5)) < [0.5, 0.1, 0.3, 0, 1]).astype(np.float32)
    return scores.astype(np.float32), targets


def test_against_scikit_learn(answers):
    scores, targets = answers
    got = jt.measures.label_scores(scores, targets)
    for label in range(3):
        column = targets[:, label], scores[:, label]
        assert got.average_precision[label] == pytest.approx(sk.average_precision_score(*column), rel=1e-12)
        assert got.auroc[label] == pytest.approx(sk.roc_auc_score(*column), rel=1e-12)
        assert jt.measures.average_precision(*column[::-1]) == got.average_precision[label]
        assert jt.measures.auroc(*column[::-1]) == got.auroc[label]
    assert np.isnan(got.average_precision[3])
    assert got.average_precision[4] == 1
    assert np.isnan(got.auroc[3:]).all()
    assert got.left_out == (3,)
    guesses = scores > 0
    assert got.summary() == pytest.approx(
        {
            "mean_average_precision": np.mean(got.average_precision[[0, 1, 2, 4]]),
            "mean_auroc": np.mean(got.auroc[:3]),
            "exact_match": sk.accuracy_score(targets, guesses),
            "binary_accuracy": 1 - sk.hamming_loss(targets, guesses),
        }
    )
    np.testing.assert_array_equal(got.support, targets.sum(axis=0))
    assert "1 labels without positives are left out" in repr(got)


def test_the_order_of_ties_is_no_matter(answers, rng):
    scores, targets = answers
    order = rng.permutation(80)
    one, other = (jt.measures.label_scores(*pair) for pair in (answers, (scores[order], targets[order])))
    np.testing.assert_array_equal(one.average_precision, other.average_precision)
    equal = jt.measures.average_precision(np.zeros(10), np.arange(10) < 3)
    assert equal == pytest.approx(0.3)
    assert jt.measures.auroc(np.zeros(10), np.arange(10) < 3) == 0.5
    assert jt.measures.auroc([-np.inf, 0, np.inf], [0, 1, 1]) == 1


def test_rows_that_the_mask_leaves_out_are_not_there(answers):
    scores, targets = answers
    poisoned = scores.copy()
    poisoned[50:] = np.nan
    got = jt.measures.label_scores(poisoned, targets, mask=np.arange(80) < 50)
    want = jt.measures.label_scores(scores[:50], targets[:50])
    assert got.examples == 50
    assert got.summary() == want.summary()


@pytest.mark.parametrize(
    ("scores", "targets", "told"),
    [
        ([[0.0]], [0], "expected logits and targets"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "no example counts"),
        ([[0.0, np.nan]], [[0, 1]], "some are NaN"),
        ([[0.0, 1.0]], [[0, 0.5]], "targets must be 0 or 1; got 0.5"),
        ([[0.0, 1.0]], [[0, 2]], "targets must be 0 or 1; got 2"),
    ],
)
def test_what_means_nothing_is_refused(scores, targets, told):
    with pytest.raises(jt.InputError, match=told):
        jt.measures.label_scores(scores, targets)
