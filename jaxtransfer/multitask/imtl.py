"""IMTL-G: the direction that goes equally far along every task's gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask._units import impartial, units


def imtl(gram: jax.Array, values: jax.Array, key: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns weights a of any sign, Σ_t a_t = 1, with which Σ_t a_t g_t has one product with all g_t / ‖g_t‖.

    (Liu et al. 2021, "Towards impartial multi-task learning", ICLR; IMTL-G.) The released code inverts a matrix that
    dependent gradients leave without an inverse. Here they have the pseudo-inverse of the cosines, as TorchJD has that
    of the products: the least-squares direction. The weights are 0 where that is none (two opposed gradients), and for
    a gradient of length 0. The paper's balance of the losses, IMTL-L, is `jt.multitask.uncertainty`, with −s for s.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.

    Returns:
      The weights [T], and the state as it is.
    """
    given = units(gram)
    # In units of the shortest one: numbers of one size.
    shortest = jnp.min(jnp.where(given.some, given.length, jnp.inf))
    weights = impartial(given) * jnp.where(given.some, shortest * given.inverse, 0)
    total, size = jnp.sum(weights), jnp.sum(jnp.abs(weights))
    rounding = 8 * len(weights) * jnp.finfo(weights.dtype).eps
    some = ~(jnp.abs(total) <= rounding * size)
    return jnp.where(some, weights / jnp.where(some, total, 1), 0), state
