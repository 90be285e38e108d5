"""How far apart two domains are: how well a linear classifier tells their features apart."""

import numpy as np
from numpy.typing import ArrayLike

from jaxtransfer.adaptation.selection.arrays import alike, rows_of
from jaxtransfer.adaptation.selection.linear import fitted
from jaxtransfer.errors import InputError


def proxy_a_distance(
    source_features: ArrayLike, target_features: ArrayLike, *, most: int = 1000, strength: float = 1e-2, seed: int = 0
) -> float:
    """Computes 2 (1 − 2ε), ε the held-out error of a linear classifier that tells two domains apart.

    Half of each domain, drawn by the seed, is learned from, the other half tested on; each domain counts the same,
    whatever its size, in learning and in ε. 0 where it can't tell them apart (also where it errs in more than half), 2
    where it always can.

    Args:
      source_features: numbers [N, D], of two examples or more.
      target_features: numbers [M, D], likewise.
      most: examples of each domain that are looked at, at most.
      strength: of the classifier's penalty, (1/n) Σ CE + strength · ½‖W‖² on standardised features.
      seed: of the choice.

    Returns:
      The distance, in [0, 2].

    Raises:
      InputError: for other shapes, a domain with a single example, numbers that are not finite.

    Reference: Ben-David et al. 2007, NeurIPS; by a linear classifier on features as in Glorot et al. 2011, ICML.
    """
    parts = rows_of(source_features, "source_features"), rows_of(target_features, "target_features")
    alike(*parts)
    if any(len(one) < 2 for one in parts):
        raise InputError(f"a distance needs two examples or more of each domain; got {len(parts[0])}, {len(parts[1])}")
    learned, tested = [], []
    for one in parts:
        order = np.random.default_rng(seed).permutation(len(one))[:most]
        half = len(order) // 2
        learned.append(one[order[:half]])
        tested.append(one[order[half:]])
    domain = np.repeat([0, 1], [len(one) for one in learned])
    score = fitted(np.concatenate(learned), domain, strength=strength, balanced=True)
    errors = np.mean(score(tested[0]) > 0), np.mean(score(tested[1]) <= 0)
    return max(0.0, 2 * (1 - 2 * float(np.mean(errors))))


def a_distance(
    source_features: ArrayLike, target_features: ArrayLike, *, most: int = 1000, strength: float = 1e-2, seed: int = 0
) -> float:
    """Computes minus `proxy_a_distance`, so that larger is better: the closer the domains' features, the larger.

    Args:
      source_features: numbers [N, D].
      target_features: numbers [M, D].
      most: as there.
      strength: as there.
      seed: as there.

    Returns:
      The score, in [−2, 0].
    """
    return -proxy_a_distance(source_features, target_features, most=most, strength=strength, seed=seed)
