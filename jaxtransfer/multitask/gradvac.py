"""GradVac: gradients are turned towards the cosines that they usually have."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask._units import units
from jaxtransfer.multitask.kinds import remembers


def _init(count: int) -> dict[str, jax.Array]:
    return {"cosines": jnp.zeros((count, count))}


@remembers(_init)
def gradvac(gram: jax.Array, values: jax.Array, key: Any, state: Any, *, decay: float = 0.01) -> tuple[jax.Array, Any]:
    """Returns the weights of Σ_t g̃_t, each gradient turned until its cosines with the others are what they usually are.

    g̃_t begins as g_t; then, for the other tasks s in random order, φ = cos(g̃_t, g_s), where φ is below its moving
    average φ̂_ts, it becomes

        g̃_t + ‖g̃_t‖ (φ̂ √(1 − φ²) − φ √(1 − φ̂²)) / (‖g_s‖ √(1 − φ̂²)) · g_s,

    whose cosine with g_s is φ̂; then φ̂_ts becomes (1 − β) φ̂_ts + β φ. With φ̂ = 0, as it begins, that is PCGrad's
    projection. (Wang et al. 2021, "Gradient vaccine", arXiv:2010.05874, its algorithm 1, for all shared parameters
    together.) LibMTL moves the average only where it turns a gradient, by β = 0.5.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: task t meets the others in the order `jax.random.permutation(jax.random.split(key, T)[t], T)`; in their own
        order where it is None.
      state: the averages φ̂ [T, T].
      decay: β.

    Returns:
      The weights [T], and the state.
    """
    given = units(gram)
    count, cosine = gram.shape[0], given.cosine
    eye = jnp.eye(count, dtype=gram.dtype)
    orders = jnp.tile(jnp.arange(count)[None], (count, 1))
    if key is not None:
        orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(key, count))

    def turned(task, usual, order):
        def meet(carry, other):
            shares, usual = carry  # of unit vectors
            length = jnp.sqrt(jnp.maximum(shares @ cosine @ shares, 0))
            met = (other != task) & given.some[other] & given.some[task] & (length > 0)
            now = jnp.clip(shares @ cosine[:, other] / jnp.where(length > 0, length, 1), -1, 1)
            goal = usual[other]
            across = jnp.sqrt(jnp.maximum(1 - goal**2, jnp.finfo(gram.dtype).eps))
            by = length * (goal * jnp.sqrt(1 - now**2) - now * across) / across
            shares = shares + jnp.where(met & (now < goal), by, 0) * eye[other]
            moved = jnp.where(met, (1 - decay) * goal + decay * now, goal)
            return (shares, jnp.where(eye[other] > 0, moved, usual)), None

        return jax.lax.scan(meet, (eye[task], usual), order)[0]

    shares, usual = jax.vmap(turned)(jnp.arange(count), state["cosines"], orders)
    return (given.length @ shares) * given.inverse, {"cosines": usual}
