"""KnOTS: task vectors of low rank, brought to common directions before they are merged."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.fusion.consensus import Consensus, disjoint_mean
from jaxtransfer.fusion.leaves import check_share, double
from jaxtransfer.fusion.task_vectors import merged
from jaxtransfer.fusion.ties import trim


def knots(
    base: Any,
    models: Sequence[Any],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    consensus: Consensus = disjoint_mean,
    tolerance: float = 1e-4,
) -> Any:
    """Returns w₀ + λ U S consensus(trim Vᵢ), with U S [V₁ … V_N] the singular value decomposition of [τ₁ … τ_N].

    (Stoica et al. 2025, arXiv:2410.19735.) Differences that LoRA made share few directions entry by entry; in the
    common basis U of their outputs they can be compared. A kernel [..., in, out] is read as its matrix [out, inputs];
    vectors are merged as they are. With `density=1` and `consensus=jt.fusion.weighted_sum` it is task arithmetic.

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more; their order does not matter.
      density: the share of entries of each Vᵢ that stays, in [0, 1].
      weights: a, one number a model; 1 each by default.
      scale: λ.
      consensus: makes one of all Vᵢ, see `jt.fusion.ties`.
      tolerance: directions with a singular value of at most this part of the largest are left out.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for shares outside of [0, 1], and for models of different architectures.
    """
    check_share(density, "density")
    check_share(tolerance, "tolerance")

    def aligned(vectors: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
        shape = vectors[0].shape
        if len(shape) < 2 or not vectors[0].size:
            return consensus([trim(vector, density) for vector in vectors], shares)
        together = np.concatenate([double(vector).reshape(-1, shape[-1]).T for vector in vectors], axis=1)
        outputs, sizes, inputs = np.linalg.svd(together, full_matrices=False)
        kept = sizes > tolerance * sizes[0]
        parts = np.split(inputs[kept], len(vectors), axis=1)
        common = consensus([trim(part, density) for part in parts], shares)
        return ((outputs[:, kept] * sizes[kept]) @ common).T.reshape(shape)

    return merged(base, models, None, weights=weights, scale=scale, consensus=aligned)
