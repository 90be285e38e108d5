"""FairGrad: gains shared out fairly, from the largest sum to the best for the worst."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.multitask._proportional import proportional
from jaxtransfer.multitask._units import units


def fair_grad(gram: jax.Array, values: jax.Array, key: Any, state: Any, *, alpha: float = 1.0) -> tuple[jax.Array, Any]:
    """Returns a > 0 with G a = a^(−1/α): the direction of the greatest α-fair utility of what the tasks gain.

    (Ban and Ji 2024, "Fair resource allocation in multi-task learning", arXiv:2402.15638.) α = 1 is the bargaining
    solution, larger ones favour the task that gains least, α → 0 is the sum. The released code minimises the squared
    residuals by SciPy; here Newton's steps solve the equation. Where gradients cancel and it has no solution, the
    direction is next to 0.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.
      alpha: α > 0.

    Returns:
      The weights [T], 0 for gradients of length 0, and the state as it is.

    Raises:
      InputError: for α that is not positive.
    """
    if not alpha > 0:
        raise InputError(f"fair_grad: alpha must be positive; got {alpha}")
    given, power = units(gram), 1 / alpha
    # With z_t = a_t ‖g_t‖ it is C z = ‖g‖^(p − 1) z^(−p), here in units of the longest gradient.
    largest = jnp.max(given.length)
    largest = jnp.where(largest > 0, largest, 1)
    relative = jnp.where(given.some, given.length / largest, 1)
    shares = proportional(given.cosine, relative ** (power - 1), power)
    shares = jnp.where(given.some, shares, 0) * largest ** ((power - 1) / (power + 1))
    return shares * given.inverse, state
