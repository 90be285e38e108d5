"""Weights that are the larger the less a task gains: the equation that Nash-MTL and FairGrad solve."""

import jax
import jax.numpy as jnp

ROUNDS = 60  # Newton's; some ten are gone where gradients don't nearly cancel


def proportional(cosine: jax.Array, right: jax.Array, power: float) -> jax.Array:
    """Returns z > 0 with C z = b z^(−p), the one minimum of ½ zᵀ C z − Σ_t b_t ∫ z_t^(−p).

    Damped Newton steps, none of which more than halves or doubles what it is near: on a convex function with this
    barrier they get there from anywhere. C gets a little on its diagonal: where gradients cancel, and no z is the
    answer, the mixture is next to 0.

    Args:
      cosine: C [T, T], positive semidefinite with ones on its diagonal.
      right: b > 0 [T].
      power: p > 0.
    """
    count = right.shape[0]
    eps = jnp.finfo(cosine.dtype).eps
    square = cosine + count * eps * jnp.eye(count, dtype=cosine.dtype)

    def go_on(carry):
        _, number, done = carry
        return ~done & (number < ROUNDS)

    def turn(carry):
        z, number, _ = carry
        pull = right * z ** (-power)
        # In units of z itself: D C D with D = diag(z), whose step is a relative one.
        inner = square * z[:, None] * z[None] + jnp.diag(power * pull * z)
        size = jnp.sqrt(jnp.diagonal(inner))
        inner = inner / size[:, None] / size[None]
        step = jnp.linalg.solve(inner, z * (pull - square @ z) / size) / size
        largest = jnp.max(jnp.abs(step))
        z = z * (1 + step / jnp.maximum(1, 2 * largest))
        return z, number + 1, ~(largest > 4 * eps)

    start = right ** (1 / (1 + power))
    return jax.lax.while_loop(go_on, turn, (start, jnp.zeros((), jnp.int32), jnp.array(False)))[0]
