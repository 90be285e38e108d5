"""ConFIG: the direction with one cosine to all gradients, as long as they agree on it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask._units import impartial, units


def con_fig(gram: jax.Array, values: jax.Array, key: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns the weights of (Σ_t ⟨g_t, v⟩) v, v the unit vector with one positive cosine to all gradients.

    v is along U⁺ 1, U⁺ the pseudo-inverse of the gradients at length 1. (Liu et al. 2024, "ConFIG: towards
    conflict-free training of physics informed neural networks", arXiv:2408.11104.) As released, gradients of length 0
    have no say, and of dependent ones v is the least-squares direction. It is that of `imtl`, with another length.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.

    Returns:
      The weights [T], and the state as it is.
    """
    given = units(gram)
    shares = impartial(given)
    products = given.cosine @ shares
    square = shares @ products
    some = square > 0
    far = (given.length @ products) / jnp.where(some, square, 1)
    return jnp.where(some, far, 0) * shares * given.inverse, state
