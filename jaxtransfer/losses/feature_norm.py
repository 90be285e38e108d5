"""Stepwise adaptive feature norm: features of both domains grow in length, a little in each step."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength, norm, wide


def afn(features: jax.Array, *, delta: float | jax.Array = 1.0) -> jax.Array:
    """Computes (‖f‖ − sg[‖f‖] − Δ)² of each example, sg no gradient: norms grow stepwise (Xu et al. 2019).

    Stepwise adaptive feature norm, SAFN (arXiv:1811.07456): the value is always Δ², the gradient −2Δ f / ‖f‖. The
    released loss is the mean over the examples, added for source and target, times 0.05. There the features come from
    a block of its own with dropout that keeps ‖f‖² instead of f in expectation (a ⊙ f / √(1 − p)): what a model gives
    as features is then to be scaled likewise in training.

    Args:
      features: float [B, ...], f; axes behind the first are one vector.
      delta: Δ > 0.

    Returns:
      The loss [B], in at least float32. The gradient of a zero vector is 0.

    Raises:
      InputError: for features without an axis of their own, or a Δ that is negative or not finite.
    """
    check_strength(delta, "delta")
    if features.ndim < 2:
        raise InputError(f"features must be [examples, ...]; got {features.shape}")
    (x,) = wide(features.reshape(len(features), -1))
    length = norm(x)[:, 0]
    return jnp.square(length - (jax.lax.stop_gradient(length) + delta))
