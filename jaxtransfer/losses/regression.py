"""Losses over real values."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError


def squared_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the squared error, averaged over everything but the batch.

    Args:
      predictions: float [B, ...].
      targets: float of the same shape.

    Returns:
      The error [B], in at least float32.

    Raises:
      InputError: where the shapes differ; they are never broadcast.
    """
    if predictions.shape != targets.shape:
        raise InputError(f"targets must have the shape of the predictions {predictions.shape}; got {targets.shape}")
    dtype = jnp.promote_types(predictions.dtype, jnp.float32)
    squares = jnp.square(predictions.astype(dtype) - targets.astype(dtype))
    return jnp.mean(squares, axis=tuple(range(1, squares.ndim)))
