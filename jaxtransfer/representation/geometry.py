"""How embeddings fill the sphere: alignment and uniformity."""

import jax
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.representation.blocks import finite, in_blocks, potentials, unit


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Computes the mean of ‖x̂ − ŷ‖² over pairs [N, D] (Wang and Isola 2020, arXiv:2005.10242); 0 is best.

    NaN where an embedding is not finite.
    """
    if np.ndim(one) != 2 or np.shape(one) != np.shape(other) or not len(one):
        raise InputError(f"alignment is of pairs, [N, D] twice; got {np.shape(one)} and {np.shape(other)}")
    if not (finite(one) and finite(other)):
        return float("nan")
    return float(np.mean(np.sum(np.square(unit(one) - unit(other)), axis=1)))


def uniformity(features: np.ndarray, *, t: float = 2.0) -> float:
    """Computes log mean exp(−t ‖x̂ᵢ − x̂ⱼ‖²) over all pairs i ≠ j of [N, D] (Wang and Isola 2020); lower is better.

    NaN where an embedding is not finite.
    """
    if len(features) < 2:
        raise InputError(f"uniformity is of pairs; got {len(features)} embeddings")
    if not finite(features):
        return float("nan")
    x = unit(features)
    bank = jax.device_put(x)
    total = np.concatenate([np.asarray(potentials(rows, bank, t)) for rows in in_blocks(x)])[: len(x)].astype(
        np.float64
    )
    own = np.exp(
        -t * (2 - 2 * np.sum(np.square(x.astype(np.float64)), axis=1))
    )  # 1, or e^(−2t) for a vector of length 0
    return float(np.log(max(total.sum() - own.sum(), 1e-300) / (len(x) * (len(x) - 1))))
