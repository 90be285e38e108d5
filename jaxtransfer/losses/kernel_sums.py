"""Sums of Gaussian kernels over all pairs of two sets, and their slopes, in memory linear in the sets.

k(x, y) = Π_l Σ_u exp(−b_lu ‖x_l − y_l‖²) over layers l and bandwidths u. Tile by tile the matrix is made for the value
and again for the derivative (`blockwise.sweep`); in between nothing of its size is held.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.losses._numerics import EXACT
from jaxtransfer.losses.blockwise import sweep


class Points(NamedTuple):
    """A set of examples, each seen at one layer or several.

    Attributes:
      layers: float [N, D_l] each, rows finite.
      keep: booleans [N]; where false the example is in no pair.
      number: integers [N]; two of the same number are no pair, as the example is the same.
    """

    layers: tuple[jax.Array, ...]
    keep: jax.Array
    number: jax.Array


Rates = tuple[jax.Array, ...]


def kernel_sum(
    rows: Points,
    columns: Points | None,
    rates: Rates,
    *,
    less: jax.Array | float = 0.0,
    chunk: int | None = None,
) -> jax.Array:
    """Computes Σᵢⱼ (k(xᵢ, yⱼ) − c) over all pairs of two sets, or of a set with itself.

    A c near most of the kernels keeps the digits of sums that are subtracted from each other.

    Args:
      rows: x.
      columns: y; None for x again, which halves the cost of the derivative.
      rates: b_l [U_l] for each layer; there is no derivative by them.
      less: c, likewise.
      chunk: the largest side of a tile; chosen by `sweep` if None.

    Returns:
      A scalar. Reverse-mode derivatives of any order exist; forward mode is refused by JAX.
    """
    return _total(chunk, rows, columns, *jax.lax.stop_gradient((rates, jnp.asarray(less, rates[0].dtype))))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(chunk, rows, columns, rates, less):
    def part(row, column):
        kernels = [kernel for kernel, _ in _tiles(row, column, rates)]
        return jnp.sum(jnp.where(_counted(row, column), _product(kernels) - less, 0), axis=1)

    return jnp.sum(sweep(part, jnp.add, 0, rows, rows if columns is None else columns, chunk))


def _forward(chunk, rows, columns, rates, less):
    return _total(chunk, rows, columns, rates, less), (rows, columns, rates)


def _backward(chunk, kept, change):
    """By xᵢ it is Σⱼ 2 wᵢⱼ (xᵢ − yⱼ) with wᵢⱼ = ∂k/∂‖xᵢ − yⱼ‖², at each layer; twice that where y is x."""
    rows, columns, rates = kept

    def part(row, column):
        tiles, counted = list(_tiles(row, column, rates)), _counted(row, column)
        slopes = []
        for layer, (x, y) in enumerate(zip(row.layers, column.layers, strict=True)):
            factors = [slope if at == layer else kernel for at, (kernel, slope) in enumerate(tiles)]
            weights = jnp.where(counted, _product(factors), 0)
            slopes.append(x * jnp.sum(weights, axis=1, keepdims=True) - jnp.matmul(weights, y, precision=EXACT))
        return tuple(slopes)

    def along(one, other, times):
        found = sweep(part, _both_added, (0,) * len(rates), one, other, chunk)
        return Points(tuple(times * change * slope for slope in found), None, None)  # pyright: ignore[reportArgumentType]

    if columns is None:
        return along(rows, rows, 4), None, None, None
    return along(rows, columns, 2), along(columns, rows, 2), None, None


_total.defvjp(_forward, _backward)


def _tiles(row: Points, column: Points, rates: Rates) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Gives for each layer Σ_u exp(−b_u d²) [r, c] and its derivative by d², d² = ‖x‖² + ‖y‖² − 2 x·y ≥ 0."""
    for x, y, rate in zip(row.layers, column.layers, rates, strict=True):
        lengths = jnp.sum(jnp.square(x), axis=1)[:, None] + jnp.sum(jnp.square(y), axis=1)[None]
        squares = jax.nn.relu(lengths - 2 * jnp.matmul(x, y.T, precision=EXACT))
        powers = [jnp.exp(-rate[at] * squares) for at in range(len(rate))]
        yield sum(powers[1:], powers[0]), -sum((rate[at] * power for at, power in enumerate(powers)), 0 * squares)


def _counted(row: Points, column: Points) -> jax.Array:
    return row.keep[:, None] & column.keep[None] & (row.number[:, None] != column.number[None])


def _product(factors: list[jax.Array]) -> jax.Array:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _both_added(one, other):
    return jax.tree.map(jnp.add, one, other)
