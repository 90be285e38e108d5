"""Squared distances between all rows of a batch: by differences, in memory that grows with the square of the batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.losses._numerics import EXACT

_AT_ONCE = 8  # rows


@jax.custom_jvp
def squared_distances(rows: jax.Array) -> jax.Array:
    """Computes ‖xᵢ − xⱼ‖² [B, B] of rows [B, D], exactly 0 for equal rows.

    By differences, not by ‖xᵢ‖² + ‖xⱼ‖² − 2 xᵢ·xⱼ, which takes their digits from close rows and leaves noise instead of
    0 for equal ones. They are made for a few rows at a time and never held: memory B² + 8·B·D, for derivatives too.
    """
    return _tile_by_tile(lambda x: jnp.sum(jnp.square(x[:, None] - rows[None]), axis=-1), rows)


@squared_distances.defjvp
def _change(primals, tangents):
    """2 (xᵢ − xⱼ)·(vᵢ − vⱼ) is Pᵢⱼ + Pⱼᵢ with Pᵢⱼ = 2 (xᵢ − xⱼ)·vᵢ, which is linear in its own row alone."""
    (rows,), (moves,) = primals, tangents

    def half(x, v):
        return jnp.einsum("rbd,rd->rb", x[:, None] - rows[None], v, precision=EXACT)

    halves = _tile_by_tile(half, rows, moves)
    return squared_distances(rows), 2 * (halves + halves.T)


def _tile_by_tile(function: Callable[..., jax.Array], *sides: jax.Array) -> jax.Array:
    """Maps `function`, [r, D] of each side to [r, B], over tiles of r rows; results [B, B].

    A tile takes every t-th row, a share of each device where rows are split. It is computed again for the derivative.
    """
    size = len(sides[0])
    count = max(-(-size // _AT_ONCE), 1)
    tiles = (jnp.pad(x, ((0, -size % count), (0, 0))).reshape(-1, count, x.shape[1]) for x in sides)
    found = jax.lax.map(jax.checkpoint(lambda side: function(*side)), tuple(jnp.moveaxis(x, 1, 0) for x in tiles))
    return jnp.moveaxis(found, 0, 1).reshape(-1, found.shape[-1])[:size]
