"""Scores of what a classifier says of unlabelled examples: how sure it is, and of how many classes."""

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.adaptation.selection.arrays import entropies, log_probabilities


def entropy(target_logits: ArrayLike) -> float:
    """Computes −(1/N) Σᵢ H(pᵢ), minus the mean entropy of the predictions in nats: the surer, the larger.

    It is largest, 0, for a model that calls everything one class, too; `information_maximization` is not.

    Args:
      target_logits: numbers [N, C].

    Returns:
      The score, in [−log C, 0].

    Raises:
      InputError: for another shape, and logits that are not finite.

    Reference: Morerio et al. 2018, arXiv:1711.10288, who choose hyper-parameters by it.
    """
    return -float(entropies(log_probabilities(target_logits, "target_logits")).mean())


def information_maximization(target_logits: ArrayLike) -> float:
    """Computes H((1/N) Σᵢ pᵢ) − (1/N) Σᵢ H(pᵢ), the mutual information of examples and predictions in nats.

    Large where the model is sure of each example, and its classes are all in use.

    Args:
      target_logits: numbers [N, C].

    Returns:
      The score, in [0, log C].

    Raises:
      InputError: for another shape, and logits that are not finite.

    Reference: Krause et al. 2010, NeurIPS; as a validator Musgrave et al. 2022, arXiv:2208.07360.
    """
    log_p = log_probabilities(target_logits, "target_logits")
    mean = np.exp(log_p).mean(axis=0)
    of_mean = -np.sum(mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny)))
    return float(of_mean - entropies(log_p).mean())


def bnm(target_logits: ArrayLike) -> float:
    """Computes ‖P‖_* / N, the sum of the singular values of the predictions P [N, C] by their number.

    Large where predictions are sure (a large Frobenius norm) and many classes occur (a high rank).

    Args:
      target_logits: numbers [N, C].

    Returns:
      The score, at most √(min(N, C) / N).

    Raises:
      InputError: for another shape, and logits that are not finite.

    Reference: Cui et al. 2020, arXiv:2003.12237, whose loss is minus this; as a validator Musgrave et al. 2022,
      arXiv:2208.07360.
    """
    probabilities = np.exp(log_probabilities(target_logits, "target_logits"))
    return float(np.linalg.svd(probabilities, compute_uv=False).sum() / len(probabilities))


def softmax_correlation(target_logits: ArrayLike) -> float:
    """Computes cos(PᵀP, I), the cosine between the classes' correlation in the predictions P [N, C] and the ideal one.

    tr(PᵀP) / (‖PᵀP‖_F √C): 1 where each prediction is sure and all classes are equally frequent.

    Args:
      target_logits: numbers [N, C].

    Returns:
      The score, in (0, 1].

    Raises:
      InputError: for another shape, and logits that are not finite.

    Reference: SoftmaxCorr, Tu et al. 2024, TMLR ("What does softmax probability tell us about classifiers ranking
      across diverse test conditions?"), with classes of equal frequency as the ideal.
    """
    probabilities = np.exp(log_probabilities(target_logits, "target_logits"))
    correlation = probabilities.T @ probabilities
    return float(np.trace(correlation) / (np.linalg.norm(correlation) * np.sqrt(len(correlation))))
