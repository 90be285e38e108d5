"""Reverse validation: whether what the target's predictions teach is true of the source."""

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.adaptation.selection.arrays import alike, labels_of, log_probabilities, rows_of
from jaxtransfer.adaptation.selection.linear import fitted
from jaxtransfer.errors import InputError


def reverse_validation(
    source_features: ArrayLike,
    source_labels: ArrayLike,
    target_features: ArrayLike,
    target_logits: ArrayLike,
    *,
    strength: float = 1e-2,
) -> float:
    """Computes the accuracy on the source of a classifier that learned from the target's predicted labels.

    A logistic regression on the target's standardised features learns the model's own predictions for them, and is
    tested by the source's labels. The full form trains the whole method anew with the domains' roles exchanged; this
    one does so on the features that are there, in seconds.

    Args:
      source_features: of held-out source examples [N, D].
      source_labels: their class numbers [N].
      target_features: features [M, D] of target examples.
      target_logits: numbers [M, C], what the model says of them.
      strength: of the classifier's penalty, (1/n) Σ CE + strength · ½‖W‖².

    Returns:
      The score, in [0, 1]. Where the model predicts a single class, the share of that class in the source.

    Raises:
      InputError: for other shapes, and numbers that are not finite.

    Reference: Zhong et al. 2010, ECML; Ganin et al. 2016, JMLR, section 5.1.2.
    """
    guesses = log_probabilities(target_logits, "target_logits").argmax(axis=1)
    target, source = rows_of(target_features, "target_features"), rows_of(source_features, "source_features")
    alike(source, target)
    if len(target) != len(guesses):
        raise InputError(f"expected features for each of {len(guesses)} logits of the target; got {len(target)}")
    labels = labels_of(source_labels, len(source), np.iinfo(np.int32).max, "source_labels")
    known = np.unique(guesses)
    if len(known) == 1:
        return float(np.mean(labels == known[0]))
    scores = fitted(target, guesses, strength=strength)(source)
    places = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
    return float(np.mean(known[places] == labels))
