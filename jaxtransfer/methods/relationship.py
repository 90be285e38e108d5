"""What the target's classes are in the source's: p(s | y), estimated from calibrated predictions of the source."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError


def calibration_temperature(logits: Any, labels: Any, *, lowest: float = 0.02, highest: float = 50.0) -> float:
    """Returns the T that minimises the mean cross-entropy of softmax(logits / T): temperature scaling.

    (Guo et al. 2017, arXiv:1706.04599.) On examples of the source that it was not trained on. The mean is convex in
    1/T, and its minimum is found by halving to 1e-10.

    Args:
      logits: [N, S] of the source.
      labels: int [N], in [0, S).
      lowest: the smallest T that may come out, where all labels are predicted right.
      highest: the largest.

    Raises:
      InputError: where shapes don't fit.
    """
    logits, labels = _checked(logits, labels, None)
    own = logits[np.arange(len(labels)), labels].mean()

    def slope(inverse: float) -> float:
        return float((_softmax(logits * inverse) * logits).sum(1).mean() - own)

    low, high = 1 / highest, 1 / lowest
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return float(1 / np.sqrt(low * high))


def direct_relationship(logits: Any, labels: Any, classes: int, *, temperature: float = 1.0) -> np.ndarray:
    """Returns p(s | y) [C, S] as the mean of softmax(zᵢ / T) over the target's examples of class y.

    (You et al. 2020, the direct approach.)

    Args:
      logits: z [N, S], the source's on the target's training examples.
      labels: int [N], the target's.
      classes: C.
      temperature: T, see `calibration_temperature`.

    Raises:
      InputError: where shapes don't fit, and for a class without an example.
    """
    logits, labels = _checked(logits, labels, classes)
    source = _softmax(logits / _positive(temperature))
    return np.stack([source[labels == label].mean(0) for label in range(classes)]).astype(np.float32)


def reverse_relationship(
    logits: Any,
    labels: Any,
    classes: int,
    *,
    temperature: float = 1.0,
    strengths: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    seed: int = 0,
) -> np.ndarray:
    """Returns p(s | y) [C, S] by Bayes' rule from p(y | s), which a classifier learns on the source's probabilities.

    (You et al. 2020, the reverse approach.) Logistic regression from softmax(zᵢ / T) to yᵢ, without a bias, says
    p(y | s) at the corner of class s; p(s) is the mean prediction, and p(s | y) = p(y | s) p(s) / Σ_s' p(y | s') p(s').

    Args:
      logits: z [N, S], the source's on the target's training examples.
      labels: int [N], the target's.
      classes: C.
      temperature: T.
      strengths: of the classifier's penalty on the mean loss, strength · ½‖W‖², among which a held-out tenth chooses.
      seed: of what is held out.

    Raises:
      InputError: where shapes don't fit, for a class without an example or a single class, and a strength that isn't
        positive.
    """
    from sklearn.linear_model import LogisticRegression

    logits, labels = _checked(logits, labels, classes)
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths must be positive; got {list(strengths)}")
    if classes < 2:
        raise InputError("the reverse approach tells classes of the target apart, two or more; got 1")
    source = _softmax(logits / _positive(temperature))

    def fitted(rows, strength):
        inverse = 1 / (strength * len(rows))
        return LogisticRegression(C=inverse, fit_intercept=False, max_iter=2000).fit(source[rows], labels[rows])

    order = np.random.default_rng(seed).permutation(len(labels))
    best = strengths[0]
    if len(strengths) > 1:
        first = np.unique(labels[order], return_index=True)[1]  # one of each class stays
        held = np.delete(order, first)[: max(1, len(labels) // 10)]
        rest = np.setdiff1d(order, held)
        if len(held):
            best = max(strengths, key=lambda one: fitted(rest, one).score(source[held], labels[held]))
    coefficients = fitted(np.arange(len(labels)), best).coef_
    if len(coefficients) == 1:  # two classes: one row of log-odds
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
    joint = _softmax(coefficients.T) * source.mean(0)[:, None]
    return (joint / joint.sum(0, keepdims=True)).T.astype(np.float32)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _positive(temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be positive and finite; got {temperature}")
    return temperature


def _checked(logits: Any, labels: Any, classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise InputError(f"expected logits [N, S] and integer labels [N]; got {logits.shape} and {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be integers; got {labels.dtype}")
    if not np.all(np.isfinite(logits)):
        raise InputError("logits must be finite")
    limit = logits.shape[1] if classes is None else classes
    if labels.min() < 0 or labels.max() >= limit:
        raise InputError(f"labels must be in [0, {limit}); got {labels.min()} to {labels.max()}")
    if classes is not None and (missing := sorted(set(range(classes)) - set(labels.tolist()))):
        raise InputError(f"every class of the target needs an example; class {missing[0]} has none")
    return logits, labels
