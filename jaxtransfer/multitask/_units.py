"""Gradients as lengths and cosines: what the rules that look at directions reckon in, whatever the losses' scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Units(NamedTuple):
    """T gradients as unit vectors.

    Attributes:
      length: of the gradients [T].
      inverse: one over it [T], 0 where the length is.
      cosine: the products of the unit vectors [T, T]; of a gradient of length 0 those of a vector beside all others.
      some: which ones have a length [T].
    """

    length: jax.Array
    inverse: jax.Array
    cosine: jax.Array
    some: jax.Array


def units(gram: jax.Array) -> Units:
    """Returns the lengths and cosines of gradients, from their products [T, T]."""
    length = jnp.sqrt(jnp.diagonal(gram))
    some = length != 0  # what is not a number is something
    inverse = jnp.where(some, 1 / jnp.where(some, length, 1), 0)
    cosine = jnp.clip(gram * inverse[:, None] * inverse[None], -1, 1)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return Units(length, inverse, jnp.where(eye > 0, 1, cosine), some)


def impartial(given: Units) -> jax.Array:
    """Returns z [T] with which Σ_t z_t u_t has the product 1 with each unit vector u_t, or the nearest to that.

    0 for gradients of length 0, and where nothing but rounding is left.
    """
    count = given.cosine.shape[0]
    values, vectors = jnp.linalg.eigh(given.cosine)
    rounding = 8 * count * jnp.finfo(values.dtype).eps
    kept = values > rounding
    ones = given.some.astype(values.dtype)
    parts = jnp.where(kept, vectors.T @ ones, 0)
    found = ones * (vectors @ (parts / jnp.where(kept, values, 1)))
    return jnp.where(jnp.max(jnp.abs(parts)) <= rounding, 0, found)
