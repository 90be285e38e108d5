"""Scores by the source's labels: accuracy there, and what it comes to where examples are weighed as the target's."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.adaptation.selection.arrays import alike, labels_of, log_probabilities, rows_of
from jaxtransfer.adaptation.selection.linear import fitted
from jaxtransfer.errors import InputError


def source_accuracy(source_logits: ArrayLike, source_labels: ArrayLike) -> float:
    """Computes the share of source examples, held out from training, that are classified rightly.

    Args:
      source_logits: numbers [N, C].
      source_labels: class numbers [N].

    Returns:
      The score, in [0, 1].

    Raises:
      InputError: for other shapes, and logits that are not finite.
    """
    log_p = log_probabilities(source_logits, "source_logits")
    labels = labels_of(source_labels, len(log_p), log_p.shape[1], "source_labels")
    return float(np.mean(log_p.argmax(axis=1) == labels))


def dev_risk(losses: ArrayLike, weights: ArrayLike) -> float:
    """Computes the importance-weighted risk with a control variate, mean(wL) + η mean(w) − η.

    η = −Cov(wL, w) / Var(w) makes its variance smallest; the weights' mean is 1 in truth. Where all weights are the
    same, or there is one example, η is 0.

    Args:
      losses: L, of each source example, [N].
      weights: w, p_target(x) / p_source(x) of each, [N].

    Returns:
      The estimate of the risk on the target: smaller is better.

    Raises:
      InputError: for other shapes, and numbers that are not finite.

    Reference: You et al. 2019, ICML (deep embedded validation); variances with N − 1, as in the released code.
    """
    losses, weights = (np.asarray(values, np.float64) for values in (losses, weights))
    if losses.ndim != 1 or losses.shape != weights.shape or not len(losses):
        raise InputError(f"expected losses [N] and weights [N]; got {list(losses.shape)} and {list(weights.shape)}")
    if not (np.isfinite(losses).all() and np.isfinite(weights).all()):
        raise InputError("losses and weights: some of the numbers are not finite; has the training diverged?")
    weighted = losses * weights
    eta = 0.0
    if len(losses) > 1:
        covariance: Any = np.cov(weighted, weights, ddof=1)
        eta = -covariance[0, 1] / covariance[1, 1] if covariance[1, 1] > 0 else 0.0
    return float(weighted.mean() + eta * weights.mean() - eta)


def dev(
    source_logits: ArrayLike,
    source_labels: ArrayLike,
    source_features: ArrayLike,
    target_features: ArrayLike,
    train_features: ArrayLike | None = None,
    *,
    strength: float = 1e-2,
) -> float:
    """Computes minus the risk of deep embedded validation: the source's cross-entropy, weighed as the target would.

    A classifier tells the domains' features apart, and the source's held-out examples weigh
    w(x) = (n_s / n_t) p(target | x) / p(source | x); their losses come to `dev_risk`. The classifier is a logistic
    regression on standardised features, (1/n) Σ CE + strength · ½‖W‖², where the paper has a small network.

    Args:
      source_logits: of held-out source examples, [N, C].
      source_labels: their class numbers [N].
      source_features: their features [N, D].
      target_features: features of target examples [M, D].
      train_features: features of source examples that were trained on [K, D], from which the classifier learns the
        source, as in the paper; None takes the held-out ones.
      strength: of the classifier's penalty.

    Returns:
      The score, −risk: larger is better.

    Raises:
      InputError: for other shapes, and numbers that are not finite.

    Reference: You et al. 2019, ICML.
    """
    log_p = log_probabilities(source_logits, "source_logits")
    labels = labels_of(source_labels, len(log_p), log_p.shape[1], "source_labels")
    held, target = rows_of(source_features, "source_features"), rows_of(target_features, "target_features")
    known = held if train_features is None else rows_of(train_features, "train_features")
    if len(held) != len(log_p):
        raise InputError(f"expected features for each of {len(log_p)} logits of the source; got {len(held)}")
    alike(held, target)
    alike(known, target)
    domain = np.repeat([0, 1], [len(known), len(target)])
    score = fitted(np.concatenate([known, target]), domain, strength=strength)
    odds = np.exp(np.clip(score(held), -50, 50))  # p(target | x) / p(source | x)
    losses = -log_p[np.arange(len(labels)), labels]
    return -dev_risk(losses, len(known) / len(target) * odds)
