"""UPGrad: each gradient is projected to where it conflicts with none, then they are averaged."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.multitask._nonnegative import nonnegative
from jaxtransfer.multitask._units import units


def up_grad(
    gram: jax.Array, values: jax.Array, key: Any, state: Any, *, regularization: float = 0.0
) -> tuple[jax.Array, Any]:
    """Returns the weights of (1/T) Σ_t π(g_t), π the projection onto the directions that conflict with no task.

    Those are the d with ⟨d, g_s⟩ ≥ 0 for all s: no task's loss rises along them. (Quinton and Rey 2024, "Jacobian
    descent for multi-objective optimization", arXiv:2406.16232.) π(g_t) = Σ_s v_s g_s with the v ≥ e_t
    that makes it shortest: T small quadratic problems, solved exactly. The released code (TorchJD) adds 1e-4 to the
    diagonal of G / trace G first, `regularization=1e-4`, by which directions may conflict a little; here it needs none.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.
      regularization: the share of the trace that is added to the diagonal.

    Returns:
      The weights [T], and the state as it is.

    Raises:
      InputError: where it is negative.
    """
    if not regularization >= 0:
        raise InputError(f"up_grad: regularization must not be negative; got {regularization}")
    count = gram.shape[0]
    eye = jnp.eye(count, dtype=gram.dtype)
    if regularization:
        trace = jnp.trace(gram)
        gram = jnp.where(trace > 0, gram + regularization * trace * eye, 0)
    given = units(gram)

    def projected(task):
        """Returns what is added to a unit vector, in unit vectors; a vector is no conflict of its own."""
        others = jnp.where(task[:, None] + task[None] > 0, eye, given.cosine)
        return nonnegative(others, jnp.where(task > 0, 0, given.cosine @ task))

    added = jax.vmap(projected)(eye)
    weights = 1 + (given.length @ added) * given.inverse
    return weights / count, state
