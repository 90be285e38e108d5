"""How well scores rank the positives before the others: average precision and the area under the ROC curve."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.errors import InputError


def average_precision(scores: ArrayLike, targets: ArrayLike) -> Any:
    """Computes Σ_n (R_n − R_{n−1}) P_n over the thresholds n, the distinct scores from the largest down.

    R_n and P_n are recall and precision of what scores no less than the n-th. Examples of one score come together, so
    the order of ties is no matter, and nothing is interpolated: scikit-learn's `average_precision_score`.

    Args:
      scores: numbers [N] or [N, L], of which only the order counts: logits do.
      targets: 0 or 1, of the same shape.

    Returns:
      A float of [N]; float64 [L] of [N, L]. NaN for a column without positives.

    Raises:
      InputError: for shapes that differ, no examples, scores that are NaN, or targets besides 0 and 1.
    """
    return _by_column(scores, targets, _average_precision)


def auroc(scores: ArrayLike, targets: ArrayLike) -> Any:
    """Computes P(score of a positive > that of a negative) + ½ P(equal), the area under the ROC curve.

    Args:
      scores: numbers [N] or [N, L], of which only the order counts.
      targets: 0 or 1, of the same shape.

    Returns:
      A float of [N]; float64 [L] of [N, L]. NaN for a column without positives, or without negatives.

    Raises:
      InputError: for shapes that differ, no examples, scores that are NaN, or targets besides 0 and 1.
    """
    return _by_column(scores, targets, _auroc)


def _by_column(scores: ArrayLike, targets: ArrayLike, measure: Any) -> Any:
    known, truth = np.asarray(scores), np.asarray(targets)
    if known.shape != truth.shape or known.ndim not in (1, 2) or not len(known):
        raise InputError(
            f"expected scores and targets of one shape, [N] or [N, L], of an example or more; got {list(known.shape)} "
            f"and {list(truth.shape)}"
        )
    if np.isnan(known.astype(np.float64)).any():
        raise InputError("scores must be numbers, and some are NaN; has the training diverged?")
    if not np.isin(truth, (0, 1)).all():
        raise InputError(f"targets must be 0 or 1; got {truth[~np.isin(truth, (0, 1))].ravel()[0]}")
    if known.ndim == 1:
        return float(measure(*_counts(known, truth)))
    return np.array([measure(*_counts(*column)) for column in zip(known.T, truth.T, strict=True)], np.float64)


def _counts(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at each threshold, from the largest score down, the positives and the others that score no less."""
    order = np.argsort(scores, kind="stable")[::-1]
    last = np.r_[scores[order][1:] != scores[order][:-1], True]  # of the examples of one score
    positives = np.cumsum(targets[order].astype(np.int64))[last]
    return positives, np.flatnonzero(last) + 1 - positives


def _average_precision(positives: np.ndarray, others: np.ndarray) -> float:
    if not positives[-1]:
        return np.nan
    return np.sum(np.diff(positives, prepend=0) * (positives / (positives + others))) / positives[-1]


def _auroc(positives: np.ndarray, others: np.ndarray) -> float:
    if not positives[-1] or not others[-1]:
        return np.nan
    before, after = np.r_[0, positives[:-1]], positives
    return np.sum(np.diff(others, prepend=0) * (before + after) / 2) / (float(positives[-1]) * others[-1])
