"""MGDA: the shortest mixture of the gradients, a direction that lowers all losses or none."""

from typing import Any

import jax
import jax.numpy as jnp


def mgda(gram: jax.Array, values: jax.Array, key: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns argmin ‖Σ_t a_t g_t‖² over weights a ≥ 0 with Σ_t a_t = 1: the multiple-gradient descent algorithm.

    (Désidéri 2012, Comptes Rendus Mathématique 350; Sener and Koltun 2018, arXiv:1810.04650, whose Frank–Wolfe steps
    give the same point where they converge.) Every task's loss falls along it at the same rate, those of weight 0 at
    least as fast; it is 0 where no direction lowers all. A task whose loss and gradient are both exactly 0, as it has
    no label in the batch, has no say.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; it only matters which are 0.
      key: nothing is drawn.
      state: none.

    Returns:
      The weights [T], and the state as it is.
    """
    return shortest(gram, (values == 0) & (jnp.diagonal(gram) == 0)), state


def shortest(gram: jax.Array, absent: jax.Array) -> jax.Array:
    """Returns the weights [T] of the point nearest to 0 in the convex hull of vectors, from their products [T, T].

    Vectors that are `absent` [T] are not among them, unless all are.

    An active set (Wolfe 1976, Mathematical Programming 11): the vector that the present point makes least of enters;
    then the nearest point of the affine hull is gone towards, and whose weight would turn negative leaves. It ends
    after finitely many rounds at the exact optimum, where Frank–Wolfe steps crawl.
    """
    count = gram.shape[0]
    largest = jnp.max(jnp.diagonal(gram))
    gram = gram / jnp.where(largest > 0, largest, 1)
    tolerance = 4 * jnp.finfo(gram.dtype).eps * jnp.abs(gram)
    nearest = jnp.argmin(jnp.where(absent, jnp.inf, jnp.diagonal(gram)))
    start = jnp.zeros(count, gram.dtype).at[nearest].set(1)

    def go_on(carry):
        _, _, number, done = carry
        return ~done & (number < 16 * count)  # rounding may make it go round and round

    def turn(carry):
        weights, active, number, _ = carry
        goal = _in_affine_hull(gram, active)
        falling = active & (goal <= 0)
        share = jnp.where(falling, weights / jnp.where(falling, weights - goal, 1), 1)
        step = jnp.min(share)
        moved = weights + jnp.clip(step, 0, 1) * (goal - weights)
        leaving = falling & (share <= step)
        moved = jnp.where(active & ~leaving, jnp.maximum(moved, 0), 0)
        slopes = gram @ moved
        rounding = tolerance @ moved
        gaps = jnp.where(active | absent, jnp.inf, slopes + rounding - moved @ slopes)
        entering = jnp.argmin(gaps)
        whole = ~jnp.any(falling)  # the optimum of this set: does another vector make it shorter?
        enters = whole & (gaps[entering] < 0)
        active = (active & ~leaving).at[entering].set(jnp.where(enters, True, (active & ~leaving)[entering]))
        return moved, active, number + 1, whole & ~enters

    weights, *_ = jax.lax.while_loop(go_on, turn, (start, start > 0, jnp.zeros((), jnp.int32), jnp.array(False)))
    weights = weights / jnp.sum(weights)
    shorter = weights @ gram @ weights <= gram[nearest, nearest]  # false where it isn't a number
    return jnp.where(shorter, weights, start)


def _in_affine_hull(gram: jax.Array, active: jax.Array) -> jax.Array:
    """Returns the weights, of any sign and 0 where not active, of the point nearest to 0 in the affine hull."""
    count = gram.shape[0]
    on = active.astype(gram.dtype)
    inner = jnp.where(active[:, None] & active[None], gram, jnp.eye(count, dtype=gram.dtype))
    # In vectors of length 1: beside long ones short ones would be lost to rounding.
    length = jnp.sqrt(jnp.where(jnp.diagonal(inner) > 0, jnp.diagonal(inner), 1))
    length = length / jnp.min(jnp.where(active, length, jnp.inf))
    inner = inner / length[:, None] / length[None]
    inner = inner / jnp.maximum(jnp.max(jnp.abs(inner)), jnp.finfo(gram.dtype).tiny)
    shares = on / length
    system = jnp.block([[inner, shares[:, None]], [shares[None], jnp.zeros((1, 1), gram.dtype)]])
    right = jnp.zeros(count + 1, gram.dtype).at[count].set(1)
    solved = jnp.linalg.solve(system, right)[:count] / length
    alone = on / jnp.maximum(jnp.sum(on), 1)
    return jnp.where(jnp.all(jnp.isfinite(solved)), solved * on, alone)  # parallel ones have no single nearest mixture
