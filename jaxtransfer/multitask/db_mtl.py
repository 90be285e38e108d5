"""DB-MTL: logarithms balance the losses, equal lengths the gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask._units import units


def db_mtl(gram: jax.Array, values: jax.Array, key: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns the weights of max_s ‖h_s‖ · Σ_t h_t / ‖h_t‖, h_t = g_t / L_t that of log L_t.

    (Lin et al. 2023, "Dual-balancing for multi-task learning", arXiv:2308.12029.) As released but for its moving
    average of each task's gradient, which would take memory for T more gradients: what an optimiser's momentum does to
    their sum. Gradients of length 0 have no say.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T], not negative; 1e-8 is added. With a negative one, which has no logarithm, the weights
        are NaN.
      key: nothing is drawn.
      state: none.

    Returns:
      The weights [T], and the state as it is.
    """
    given = units(gram)
    above = jnp.where(values < 0, jnp.nan, values + 1e-8)
    return jnp.max(given.length / above) * given.inverse, state
