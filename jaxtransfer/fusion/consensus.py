"""How the task vectors of several models become one: added up, or only where their signs agree.

Each is a function `(vectors, weights) -> vector` of the models' differences from the base at one leaf: an argument of
`jt.fusion.ties`, `dare`, `della` and `breadcrumbs`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtransfer.fusion.leaves import double

Consensus = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]


def weighted_sum(vectors: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Returns Σᵢ aᵢ τᵢ, in double precision.

    Args:
      vectors: τ, N arrays of one shape.
      weights: a [N].
    """
    total: Any = 0.0
    for vector, weight in zip(vectors, weights, strict=True):
        total = total + weight * double(vector)
    return total


def weighted_mean(vectors: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Returns Σᵢ aᵢ τᵢ / Σᵢ aᵢ, the sum alone where the weights sum to 0: mergekit's `normalize: true`.

    Args:
      vectors: τ, N arrays of one shape.
      weights: a [N].
    """
    return weighted_sum(vectors, weights) / _divisor(np.asarray(np.sum(weights)))


def disjoint_mean(vectors: Sequence[np.ndarray], weights: np.ndarray, *, by_count: bool = False) -> np.ndarray:
    """Returns Σ_{i ∈ A} aᵢ τᵢ / |A|, A those whose sign is that of Σᵢ τᵢ: the election of TIES as peft released it.

    The *unweighted* vectors elect, and the weighted ones are divided by how many agree. Weights of 1 give the paper's
    mean. A sum of 0 counts as positive; a zero agrees with nobody.

    Args:
      vectors: τ, N arrays of one shape.
      weights: a [N].
      by_count: elect the sign that more vectors have, whatever their size: peft's `majority_sign_method="frequency"`.
    """
    agree = elected(vectors, by_count)
    number = np.sum(agree, axis=0)
    return weighted_sum([v * mask for v, mask in zip(vectors, agree, strict=True)], weights) / np.maximum(number, 1)


def weighted_disjoint_mean(vectors: Sequence[np.ndarray], weights: np.ndarray, *, by_count: bool = False) -> np.ndarray:
    """Returns Σ_{i ∈ A} aᵢ τᵢ / Σ_{i ∈ A} aᵢ, A those whose aᵢ τᵢ has the sign of Σᵢ aᵢ τᵢ: mergekit's election.

    The *weighted* vectors elect, and their sum is divided by the weights of those that agree (where these sum to 0,
    by 1): `normalize: true`, the default of mergekit's `ties` and `della`.

    Args:
      vectors: τ, N arrays of one shape.
      weights: a [N].
      by_count: elect the sign that more vectors have, whatever their size: mergekit's consensus method `count`.
    """
    agree = elected([weight * double(v) for v, weight in zip(vectors, weights, strict=True)], by_count)
    total = weighted_sum([v * mask for v, mask in zip(vectors, agree, strict=True)], weights)
    return total / _divisor(weighted_sum(agree, weights))


def weighted_disjoint_sum(vectors: Sequence[np.ndarray], weights: np.ndarray, *, by_count: bool = False) -> np.ndarray:
    """Returns Σ_{i ∈ A} aᵢ τᵢ, A those whose aᵢ τᵢ has the sign of Σᵢ aᵢ τᵢ: mergekit's `normalize: false`.

    The default of mergekit's `dare_ties` and `breadcrumbs_ties`.

    Args:
      vectors: τ, N arrays of one shape.
      weights: a [N].
      by_count: elect the sign that more vectors have, whatever their size.
    """
    agree = elected([weight * double(v) for v, weight in zip(vectors, weights, strict=True)], by_count)
    return weighted_sum([v * mask for v, mask in zip(vectors, agree, strict=True)], weights)


def elected(vectors: Sequence[np.ndarray], by_count: bool) -> list[np.ndarray]:
    """Returns, for each vector, which of its entries have the sign that all of them elect; a sum of 0 is positive.

    Args:
      vectors: τ, N arrays of one shape.
      by_count: elect the sign that more vectors have, whatever their size.
    """
    signs = [np.sign(vector) for vector in vectors]
    votes = weighted_sum(signs if by_count else vectors, np.ones(len(vectors)))
    elected = np.where(votes >= 0, 1, -1)
    return [sign == elected for sign in signs]


def _divisor(total: np.ndarray) -> np.ndarray:
    return np.where(np.abs(total) < 1e-8, 1, total)
