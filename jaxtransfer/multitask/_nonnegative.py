"""The least of a small quadratic over numbers that are not negative, exactly: what several rules come down to."""

import jax
import jax.numpy as jnp


def nonnegative(square: jax.Array, linear: jax.Array) -> jax.Array:
    """Returns argmin ½ xᵀ C x + qᵀ x over x ≥ 0, C positive semidefinite with ones on its diagonal.

    An active set (Lawson and Hanson 1974, chapter 23): what lowers the value most enters, the rest is solved for, and
    what would turn negative leaves. It ends at the exact optimum after a number of rounds that is finite; 8 T at most
    are gone, as rounding may make it go round and round.

    Args:
      square: C [T, T].
      linear: q [T].
    """
    count = linear.shape[0]
    eps = jnp.finfo(linear.dtype).eps
    eye = jnp.eye(count, dtype=linear.dtype)
    square = square + count / 2 * eps * eye  # parallel vectors have no single answer

    def go_on(carry):
        _, _, _, number, done = carry
        return ~done & (number < 8 * count)

    def turn(carry):
        x, active, refused, number, _ = carry
        inner = jnp.where(active[:, None] & active[None], square, eye)
        goal = jnp.where(active, jnp.linalg.solve(inner, jnp.where(active, -linear, 0)), 0)
        falling = active & (goal <= 0)
        share = jnp.where(falling, x / jnp.where(falling, x - goal, 1), 1)
        step = jnp.clip(jnp.min(share), 0, 1)
        moved = jnp.where(active, jnp.maximum(x + step * (goal - x), 0), 0)
        leaving = falling & (share <= step)
        refused = refused | (leaving & (x == 0))  # it had just come, and rounding sends it away
        moved = jnp.where(leaving, 0, moved)
        stays = active & ~leaving
        whole = ~jnp.any(falling)
        refused = refused & ~(whole & (step > 0) & jnp.any(moved != x))
        slopes = square @ moved + linear
        rounding = 4 * eps * (jnp.abs(square) @ moved + jnp.abs(linear))
        gains = jnp.where(stays | refused, jnp.inf, slopes + rounding)
        entering = jnp.argmin(gains)
        enters = whole & (gains[entering] < 0)
        active = stays | (enters & (jnp.arange(count) == entering))
        return moved, active, refused, number + 1, whole & ~enters

    none = jnp.zeros(count, bool)
    start = (jnp.zeros_like(linear), none, none, jnp.zeros((), jnp.int32), jnp.array(False))
    return jax.lax.while_loop(go_on, turn, start)[0]
