"""Aligned-MTL: gradients made orthogonal and equally long, as near to what they were as can be."""

from typing import Any

import jax
import jax.numpy as jnp


def aligned_mtl(gram: jax.Array, values: jax.Array, key: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns σ V Σ⁻¹ Vᵀ 1, with G = V Σ² Vᵀ and σ the least of the singular values that are not 0.

    Each principal component of the gradients is brought to the length of the shortest one, which makes their system as
    well conditioned as can be. (Senushkin et al. 2023, "Independent component alignment", arXiv:2305.19000, its
    algorithm 1.) As released, components of eigenvalues up to T ε times the largest are left out, ε that of float32,
    and the weights are those of the sum (TorchJD has the mean, 1/T of them). It looks at lengths: where they are very
    different, the shortest gradients fall under that bound.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.

    Returns:
      The weights [T], 1 where all gradients are 0, and the state as it is.
    """
    count = gram.shape[0]
    largest = jnp.max(jnp.diagonal(gram))
    squares, vectors = jnp.linalg.eigh(gram / jnp.where(largest > 0, largest, 1))
    kept = squares > squares[-1] * count * jnp.finfo(gram.dtype).eps
    least = jnp.sqrt(jnp.min(jnp.where(kept, squares, jnp.inf)))
    inverse = jnp.where(kept, least / jnp.sqrt(jnp.where(kept, squares, 1)), 0)
    weights = vectors @ (inverse * jnp.sum(vectors, axis=0))
    return jnp.where(largest == 0, 1, weights), state
