"""Nash-MTL: the direction that the tasks would agree on by bargaining."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask._proportional import proportional
from jaxtransfer.multitask._units import units


def nash_mtl(
    gram: jax.Array, values: jax.Array, key: Any, state: Any, *, max_norm: float = 1.0
) -> tuple[jax.Array, Any]:
    """Returns a > 0 with G a = 1 / a, scaled down where the direction is longer than `max_norm`.

    The solution maximises Σ_t log⟨d, g_t⟩ over directions d of one length, the Nash bargaining solution: d does not
    change when a loss is multiplied by a number, and its length is √T. (Navon et al. 2022, "Multi-task learning as a
    bargaining game", arXiv:2202.01017.) The bound on the length is the released code's, as in LibMTL and TorchJD. They
    go some twenty convex problems towards the solution (`optim_niter`), from where they stood the step before, and may
    do so every few steps alone (`update_weights_every`); here Newton's steps reach it in each, at next to no cost, and
    nothing is remembered. Where gradients cancel and there is none, the direction is next to 0.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.
      max_norm: the greatest length of the direction on the shared parameters; 0 for no bound.

    Returns:
      The weights [T], 0 for gradients of length 0, and the state as it is.
    """
    given = units(gram)
    shares = proportional(given.cosine, jnp.ones_like(given.length), 1.0)
    shares = jnp.where(given.some, shares, 0)
    if max_norm > 0:
        long = jnp.sqrt(jnp.maximum(shares @ given.cosine @ shares, 0))
        shares = jnp.where(long > max_norm, max_norm / jnp.where(long > 0, long, 1), 1) * shares
    return shares * given.inverse, state
