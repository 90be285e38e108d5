"""How well a linear classifier reads the classes off frozen features, trained to convergence."""

from collections.abc import Sequence

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.representation.blocks import finite
from jaxtransfer.representation.checks import check_embedded
from jaxtransfer.representation.embedding import Embedded


def linear_probe(
    train: Embedded, test: Embedded, *, strengths: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), seed: int = 0
) -> float:
    """Fits an L2-regularised logistic regression to convergence (L-BFGS, scikit-learn) and returns its test accuracy.

    Minimises (1/n) Σ CE + strength · ½‖W‖² on standardised features. Where several strengths are given, a tenth of the
    training examples, held out by `seed`, chooses; the chosen one is fitted to all of them.

    Args:
      train: embeddings with labels.
      test: the same of the test examples.
      strengths: of the penalty.
      seed: of the held-out part.

    Returns:
      The share of test examples that it classifies rightly; NaN where an embedding is not finite.

    Raises:
      InputError: without labels, for a single class, embeddings of other dimensions, or a strength below or at 0.
    """
    from sklearn.linear_model import LogisticRegression

    check_embedded(train, test)
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths must be positive; got {list(strengths)}")
    if len(np.unique(train.labels)) < 2:
        raise InputError(f"a linear probe tells classes apart; all {len(train.labels)} training examples are of one")
    if not (finite(train.features) and finite(test.features)):
        return float("nan")
    mean, std = (moment(train.features, axis=0, dtype=np.float64) for moment in (np.mean, np.std))
    x, others = (((one.features - mean) / np.maximum(std, 1e-6)).astype(np.float32) for one in (train, test))
    y = train.labels

    def fitted(x, y, strength):
        return LogisticRegression(C=1 / (strength * len(x)), max_iter=2000, tol=1e-5).fit(x, y)

    best = strengths[0]
    if len(strengths) > 1:
        order = np.random.default_rng(seed).permutation(len(x))
        stays = np.unique(y[order], return_index=True)[1]  # one of each class, which can't be held out
        held = np.delete(order, stays)[: max(1, len(x) // 10)]
        rest = np.setdiff1d(order, held)
        if len(held):
            best = max(strengths, key=lambda strength: fitted(x[rest], y[rest], strength).score(x[held], y[held]))
    return float(fitted(x, y, best).score(others, test.labels))
