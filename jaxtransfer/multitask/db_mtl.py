"""DB-MTL: logarithms balance the losses, equal lengths the gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.multitask._units import units
from jaxtransfer.multitask.kinds import averages


def _average(*, beta: float = 0.0, beta_sigma: float = 0.0) -> Any:
    """Returns how the gradients of the logarithms are averaged; None where they are not."""
    if not 0 <= beta < 1:
        raise InputError(f"db_mtl: beta must be in [0, 1); got {beta}")
    if not beta:
        return None

    def average(values: jax.Array, update: jax.Array) -> tuple[jax.Array, jax.Array]:
        return 1 / _above(values), beta / update.astype(values.dtype) ** beta_sigma

    return average


@averages(_average)
def db_mtl(
    gram: jax.Array, values: jax.Array, key: Any, state: Any, *, beta: float = 0.0, beta_sigma: float = 0.0
) -> tuple[jax.Array, Any]:
    """Returns the weights of max_s ‖ĥ_s‖ · Σ_t ĥ_t / ‖ĥ_t‖, ĥ_t the moving average of h_t = g_t / L_t, that of log L_t.

    (Lin et al. 2023, "Dual-balancing for multi-task learning", arXiv:2308.12029.) In update k, the first being 1,
    ĥ_t ← b_k ĥ_t + (1 − b_k) h_t from 0, with b_k = β / k^σ. In LibMTL β is `DB_beta`, 0.9, and σ `DB_beta_sigma`, 0:

        objective = jt.balance(tasks, functools.partial(jt.multitask.db_mtl, beta=0.9), shared="net/encoder")

    The averages take the memory of T gradients of the shared parameters, in the state and in checkpoints, under
    `balance_gradients`; with β = 0, as by default, there are none, and an optimiser's momentum does much the same to
    their sum. Gradients of length 0 have no say. Parameters that are not shared get the gradient of their own L_t, as
    with every rule; in LibMTL it is that of log L_t, which an optimiser like Adam hardly tells apart.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T]; with β > 0 that of the averages.
      values: of the losses [T], not negative; 1e-8 is added. With a negative one, which has no logarithm, the weights
        are NaN.
      key: nothing is drawn.
      state: none.
      beta: β in [0, 1).
      beta_sigma: σ, 0 or more.

    Returns:
      The weights [T], and the state as it is.

    Raises:
      InputError: for β out of range.
    """
    given = units(gram)
    above = _above(values) if not beta else jnp.ones_like(values)
    return jnp.max(given.length / above) * given.inverse, state


def _above(values: jax.Array) -> jax.Array:
    return jnp.where(values < 0, jnp.nan, values + 1e-8)
