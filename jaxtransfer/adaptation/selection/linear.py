"""The linear classifier by which domains and classes are told apart: logistic regression on standardised features."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError


def fitted(x: np.ndarray, y: np.ndarray, *, strength: float, balanced: bool = False) -> Callable[[np.ndarray], Any]:
    """Fits (1/n) Σ CE + strength · ½‖W‖² and returns its decision function: above 0 for the second of two classes.

    Of more classes it gives a score for each, in the order of `np.unique(y)`.

    Args:
      x: features [N, D].
      y: class numbers [N], two different ones or more.
      strength: of the penalty, above 0.
      balanced: whether each class counts the same in all.
    """
    from sklearn.linear_model import LogisticRegression

    if not strength > 0:
        raise InputError(f"strength must be above 0; got {strength}")
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    weight = "balanced" if balanced else None
    model = LogisticRegression(C=1 / (strength * len(x)), max_iter=2000, tol=1e-4, class_weight=weight)
    model.fit((x - mean) / scale, y)
    return lambda rows: model.decision_function((rows - mean) / scale)
