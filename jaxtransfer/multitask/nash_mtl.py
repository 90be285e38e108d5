"""Nash-MTL: the direction that the tasks would agree on by bargaining."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask._proportional import proportional
from jaxtransfer.multitask._units import units


def nash_mtl(
    gram: jax.Array, values: jax.Array, key: Any, state: Any, *, max_norm: float = 1.0
) -> tuple[jax.Array, Any]:
    """Returns a > 0 with (G / ‖G‖) a = 1 / a, scaled down where the direction is longer than `max_norm`.

    The solution of G a = 1 / a maximises Σ_t log⟨d, g_t⟩ over directions of one length, the Nash bargaining solution:
    it does not change when a loss is multiplied by a number. (Navon et al. 2022, "Multi-task learning as a bargaining
    game", arXiv:2202.01017.) ‖G‖, Frobenius' norm, and the bound on the length are the released code's. That code goes
    some twenty convex problems towards the solution, from where it stood the step before; here Newton's steps reach it,
    and nothing is remembered. Where gradients cancel and there is none, the direction is next to 0.

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
    largest = jnp.max(given.length)
    relative = given.length / jnp.where(largest > 0, largest, 1)  # squares of squares would leave the range
    norm = jnp.sqrt(jnp.sum((given.cosine * relative[:, None] * relative[None]) ** 2))
    scale = jnp.sqrt(norm) * largest
    if max_norm > 0:
        long = jnp.sqrt(jnp.maximum(shares @ given.cosine @ shares, 0))
        far = scale * long
        scale = jnp.where(far > max_norm, max_norm / jnp.where(long > 0, long, 1), scale)
    return scale * shares * given.inverse, state
