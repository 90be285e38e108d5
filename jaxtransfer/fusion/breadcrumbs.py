"""Model breadcrumbs: task vectors without their smallest entries and without their outliers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.fusion.consensus import Consensus, weighted_sum
from jaxtransfer.fusion.leaves import check_share
from jaxtransfer.fusion.task_vectors import merged


def breadcrumbs(
    base: Any,
    models: Sequence[Any],
    *,
    density: float = 0.9,
    gamma: float = 0.01,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    consensus: Consensus = weighted_sum,
) -> Any:
    """Returns w₀ + λ · consensus(τᵢ without its largest γ and its smallest entries), leaf by leaf.

    (Davari and Belilovsky 2024, arXiv:2312.06795.) Of a leaf's n entries the largest ⌊γn⌋ go first, then so many of
    the smallest that ⌊density · n⌋ stay; mergekit's `breadcrumbs`. As there, a density of 1 keeps outliers, too.
    (Before 0.1.5 it dropped a leaf as a whole where ⌊γn⌋ = 0.)

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more; their order does not matter.
      density: the share of entries that stays, in [0, 1].
      gamma: γ, the share of outliers, in [0, 1].
      weights: a, one number a model; 1 each by default.
      scale: λ.
      consensus: `jt.fusion.weighted_sum`; `weighted_disjoint_sum` for mergekit's `breadcrumbs_ties`.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for shares outside of [0, 1], and for models of different architectures.
    """
    check_share(density, "density")
    check_share(gamma, "gamma")

    def middle(vector, path, number):
        if density >= 1:
            return vector
        count, target, top = vector.size, int(density * vector.size), int(gamma * vector.size)
        bottom = count - target - top
        if bottom < 0:  # fewer outliers go, so that enough stays
            top, bottom = top + bottom, 0
        order = np.argsort(np.abs(vector).reshape(-1), kind="stable")
        mask = np.zeros(count, bool)
        mask[order[bottom : count - top]] = True
        return vector * mask.reshape(vector.shape)

    return merged(base, models, middle, weights=weights, scale=scale, consensus=consensus)
