"""Sliced Wasserstein distance: two sets are compared along directions, where sorting tells what goes where."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_domains, kept_rows, normalize, wide
from jaxtransfer.losses.blockwise import everywhere


def sliced_wasserstein(
    p1: jax.Array,
    p2: jax.Array,
    *,
    directions: jax.Array,
    p1_mask: jax.Array | None = None,
    p2_mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the mean over directions of the squared Wasserstein distance of projections (Lee et al. 2019).

    (1/K) Σ_θ ∫₀¹ (F_θ⁻¹(u) − G_θ⁻¹(u))² du, arXiv:1903.04064, F and G the projections of both sets on θ; at equal sizes
    the mean over the sorted rows of (p₁·θ − p₂·θ)², as released. There p₁ and p₂ are the probabilities that two
    classifiers give the same examples, and 128 directions are drawn from a normal distribution.

    Args:
      p1: float [n, d].
      p2: float [m, d].
      directions: float [d, K]; they are brought to length 1 here.
      p1_mask: [n]; 0 leaves an example out.
      p2_mask: [m].
      axis_name: of the axis over which both are split under `pmap`: the value is that of the rows of all devices.

    Returns:
      A scalar, in at least float32; 0 where a set has no example. Where rows tie, their order is that of the batch.

    Raises:
      InputError: where the shapes do not fit.
    """
    check_domains(p1, p2)
    if directions.ndim != 2 or len(directions) != p1.shape[1] or not directions.shape[1]:
        raise InputError(
            f"directions must be [{p1.shape[1]}, K], columns that both are projected on; got {directions.shape}"
        )
    one, other, directions = wide(p1, p2, directions)
    theta = normalize(directions, axis=0)
    sides = []
    for x, mask in ((one, p1_mask), (other, p2_mask)):
        keep = kept_rows(mask, len(x))
        scores = jnp.matmul(jnp.where(keep[:, None], x, 0), theta, precision=EXACT)
        scores, keep = everywhere((scores, keep), axis_name) or (scores, keep)
        sides.append((jnp.sort(jnp.where(keep[:, None], scores, jnp.inf), axis=0), jnp.sum(keep)))
    (a, n), (b, m) = sides
    if len(a) == len(b) and p1_mask is None and p2_mask is None:
        return jnp.mean(jnp.square(a - b))
    edges = jnp.concatenate([_shares(len(a), n, one.dtype), _shares(len(b), m, one.dtype)])
    edges = jnp.sort(jnp.minimum(edges, 1))
    begins = jnp.concatenate([jnp.zeros(1, edges.dtype), edges[:-1]])
    middles = (begins + edges) / 2
    gaps = _at(a, n, middles) - _at(b, m, middles)
    value = jnp.sum((edges - begins)[:, None] * jnp.square(gaps)) / theta.shape[1]
    return jnp.where((n > 0) & (m > 0), value, 0)


def _shares(size: int, count: jax.Array, dtype: Any) -> jax.Array:
    """Returns (i + 1) / count, up to where each of the sorted rows stands among those that count."""
    return (jnp.arange(size) + 1).astype(dtype) / jnp.maximum(count, 1).astype(dtype)


def _at(rows: jax.Array, count: jax.Array, shares: jax.Array) -> jax.Array:
    """Returns the quantiles of sorted rows, of which the first `count` count."""
    place = jnp.clip(jnp.floor(shares * count.astype(shares.dtype)).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))
    found = rows[place]
    return jnp.where(jnp.isposinf(found), 0, found)  # of a set without examples
