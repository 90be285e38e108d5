"""Soft neighbourhood density: whether target examples have neighbours that the classifier says the same of."""

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.adaptation.selection.arrays import entropies, log_probabilities
from jaxtransfer.errors import InputError

_ENTRIES = 2**20  # of the matrix of similarities at a time, in whole rows


def snd(target_logits: ArrayLike, *, temperature: float = 0.05) -> float:
    """Computes the soft neighbourhood density: the mean entropy of each example's similarities to all others.

    With uᵢ the softmax output of unit length, sᵢⱼ = softmax over j ≠ i of (uᵢ·uⱼ / τ), it is (1/N) Σᵢ H(sᵢ): large
    where examples lie in dense clusters of the output space. The matrix is gone through in blocks of rows,
    fewer the longer they are: memory is linear in N.

    Args:
      target_logits: numbers [N, C], of two examples or more.
      temperature: τ, above 0.

    Returns:
      The score, in [0, log(N − 1)]; it grows with N, so compare models on the same examples.

    Raises:
      InputError: for another shape, a single example, a temperature that is not above 0, logits that are not finite.

    Reference: Saito et al. 2021, arXiv:2108.10860. The released code sets an example's similarity to itself to −1/τ
      where the paper, and this, leaves it out; at τ = 0.05 that is a share of e⁻²⁰ at most.
    """
    probabilities = np.exp(log_probabilities(target_logits, "target_logits"))
    if len(probabilities) < 2:
        raise InputError("snd compares examples with each other; got one of them")
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    units = probabilities / np.linalg.norm(probabilities, axis=1, keepdims=True)
    total = 0.0
    size = max(1, _ENTRIES // len(units))
    for start in range(0, len(units), size):
        block = units[start : start + size]
        scores = block @ units.T / temperature
        rows = np.arange(len(block))
        scores[rows, start + rows] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        scores[rows, start + rows] = np.finfo(np.float64).min / 2  # whose probability is 0, and 0 times it is 0
        total += entropies(scores).sum()
    return float(total / len(units))
