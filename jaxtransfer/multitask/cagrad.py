"""CAGrad: near the mean gradient, the direction in which the worst task gains most."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.multitask._nonnegative import nonnegative
from jaxtransfer.multitask._units import units

ROUNDS = 40


def cagrad(
    gram: jax.Array, values: jax.Array, key: Any, state: Any, *, c: float = 0.5, rescale: int = 1
) -> tuple[jax.Array, Any]:
    """Returns the weights of d = argmax_d min_t ⟨d, g_t⟩ with ‖d − g₀‖ ≤ c ‖g₀‖, g₀ = (1/T) Σ_t g_t.

    (Liu et al. 2021, "Conflict-averse gradient descent", arXiv:2110.14048.) As the paper shows, d is
    g₀ + c ‖g₀‖ g_w / ‖g_w‖ where w ≥ 0, Σ_t w_t = 1, has the least ⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖, g_w = Σ_t w_t g_t. The
    released code looks for it by SciPy's SLSQP from equal weights; here it is exact: for a level ν, what is least over
    y ≥ 0 of ½ ‖Σ_t y_t g_t‖² plus a linear function of it is g_w / ‖g_w‖ for the ν at which it has length 1, the value
    of both problems; where g_w = 0, as some gradients cancel, it is shorter, and d lies inside of the ball. By default
    d is divided by 1 + c² as released.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: nothing is drawn.
      state: none.
      c: the radius, in [0, 1); with 0 it is the mean. The released experiments have 0.4 and 0.5.
      rescale: 0 for d itself, as in the paper; 1 for d / (1 + c²); 2 for d / (1 + c).

    Returns:
      The weights [T], and the state as it is.

    Raises:
      InputError: for c out of range, and another rescaling.
    """
    if not 0 <= c < 1 or rescale not in (0, 1, 2):
        raise InputError(f"cagrad: expected c in [0, 1) and rescale 0, 1 or 2; got {c} and {rescale}")
    count = gram.shape[0]
    weights = jnp.full(count, 1 / count, gram.dtype)
    if c > 0:
        weights = weights + c * _along(gram, c)
    return weights / (1, 1 + c**2, 1 + c)[rescale], state


def _along(gram: jax.Array, radius: float) -> jax.Array:
    """Returns the weights of ‖g₀‖ g_w / ‖g_w‖; 0 where no direction is better than another one."""
    given = units(gram)
    count, eps = gram.shape[0], jnp.finfo(gram.dtype).eps
    mean_length = given.length @ (given.cosine @ given.length)  # of the sum, squared
    mean_length = jnp.sqrt(jnp.maximum(mean_length, 0)) / count
    some = mean_length > count * eps * jnp.max(given.length)
    # In units of ‖g₀‖, and of the shortest gradient for the level.
    along = given.cosine @ given.length / count / jnp.where(some, mean_length, 1)
    shortest = jnp.min(jnp.where(given.some, given.length, jnp.inf))
    share = jnp.where(given.some, shortest * given.inverse, 0)  # in (0, 1]

    least = jnp.abs(along[jnp.argmin(jnp.where(given.some, given.length, jnp.inf))])  # what a level is rounded beside

    def solved(level):
        """Returns y and ‖Σ_t y_t u_t‖², at a level in units of ‖g₀‖ · the shortest length."""
        linear = jnp.where(given.some, (along - level * share) / radius, 1)
        y = nonnegative(given.cosine, linear)
        return y, jnp.maximum(-linear @ y, 0)

    def by_task(of):
        return jnp.min(jnp.where(given.some, of / jnp.where(given.some, share, 1), jnp.inf))

    def go_on(carry):
        _, _, _, number, done = carry
        return ~done & (number < ROUNDS)

    def turn(carry):
        low, high, level, number, _ = carry
        y, square = solved(level)
        low, high = jnp.where(square <= 1, level, low), jnp.where(square <= 1, high, level)
        # On one set of tasks ‖·‖² is a quadratic of the level; its slope follows from y. Newton's step on the length.
        slope = _slope(given.cosine, y, share / radius)
        length = jnp.sqrt(square)
        better = level + (1 - length) * length / jnp.where(slope > 0, slope, jnp.inf)
        # There already: rounding says on which side, and halving what is left would lead away from it.
        there = (slope > 0) & (jnp.abs(better - level) <= 2 * eps * jnp.maximum(jnp.abs(level), least))
        inside = (better > low) & (better < high) & (slope > 0)
        found = jnp.where(there, level, jnp.where(inside, better, (low + high) / 2))
        return low, high, found, number + 1, jnp.abs(found - level) <= eps * jnp.abs(level)

    low, high = by_task(along), by_task(along + radius)
    start = (low, high, high, jnp.zeros((), jnp.int32), jnp.array(False))
    level = jax.lax.while_loop(go_on, turn, start)[2]
    y, _ = solved(level)
    square = y @ (given.cosine @ y)
    y = y / jnp.maximum(jnp.sqrt(jnp.maximum(square, 0)), 1)  # shorter where some cancel
    return jnp.where(some, mean_length, 0) * y * given.inverse


def _slope(cosine: jax.Array, y: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the derivative of ½ ‖Σ_t y_t u_t‖² by the level, the tasks with y > 0 staying the same."""
    active = y > 0
    count = len(y)
    eye = jnp.eye(count, dtype=y.dtype)
    square = cosine + count / 2 * jnp.finfo(y.dtype).eps * eye
    inner = jnp.where(active[:, None] & active[None], square, eye)
    change = jnp.linalg.solve(inner, jnp.where(active, share, 0))
    return y @ (square @ change)
