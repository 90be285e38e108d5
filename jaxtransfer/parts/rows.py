"""What objectives do with the rows of a batch: leave some out, and bring those of all devices together."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import normalize
from jaxtransfer.objective import Batch, Context, Mean
from jaxtransfer.parts.masking import mask_of


def kept(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the rows with zeros where the mask is 0: what stands there must not reach the gradient (0 · NaN)."""
    if mask is None:
        return rows
    return jnp.where(mask.reshape(-1, *[1] * (rows.ndim - 1)) > 0, rows, jnp.zeros((), rows.dtype))


def gathered(rows: dict[str, Any], batch: Batch, ctx: Context) -> tuple[dict[str, Any], jax.Array]:
    """Returns entries of all devices' rows, zero where the batch's mask is 0, and that mask, ones without one."""
    mask = mask_of(batch)
    rows = {name: jax.tree.map(lambda leaf: ctx.gather(kept(leaf, mask)), entry) for name, entry in rows.items()}
    size = jax.tree.leaves(rows)[0].shape[0]
    return rows, jnp.ones(size) if mask is None else ctx.gather(mask)


def ranked(values: jax.Array, ctx: Context, groups: jax.Array | None = None) -> jax.Array:
    """Returns the places [B] of this device's rows among those of all devices, 0 for the smallest value.

    Rows of one value stand in the order of the batch, those that are not a number last.

    Args:
      values: one for each row [B]; infinity for those that are to stand behind.
      ctx: the context.
      groups: whole numbers [B], where a row is to be counted among those of its own group alone.
    """
    every = ctx.gather(values)
    numbers = jnp.arange(len(every), dtype=jnp.int32)
    if groups is None:
        order, places = jnp.argsort(every, stable=True), numbers
    else:
        kinds = ctx.gather(groups)
        order = jnp.lexsort((every, kinds))
        places = numbers - jnp.searchsorted(kinds[order], kinds[order]).astype(jnp.int32)
    placed = jnp.zeros_like(numbers).at[order].set(places)
    first = 0 if ctx.axis is None else len(values) * jax.lax.axis_index(ctx.axis)
    return jax.lax.dynamic_slice_in_dim(placed, first, len(values))


def check_several(rows: jax.Array, ctx: Context, what: str) -> None:
    """Raises where the global batch has a single row, of whose `rows` [B, ...] this device has its part."""
    if len(rows) * (1 if ctx.axis is None else jax.lax.axis_size(ctx.axis)) < 2:
        raise InputError(
            f"{what} needs two examples or more in a batch: one alone has nothing to be told from, its loss says "
            f"nothing and its gradient is none. Choose a larger batch"
        )


def mean_of_all(values: jax.Array, mask: jax.Array) -> Mean:
    """Returns the mean of values [B] of all devices' rows, or a scalar of them, weighted by `mask` [B]."""
    if values.ndim == 0:
        count = jnp.sum(mask).astype(values.dtype)
        return Mean(values * count, count)
    weights = mask.astype(values.dtype)
    return Mean(jnp.sum(jnp.where(weights > 0, values, 0) * weights), jnp.sum(weights))


def unit(rows: jax.Array) -> jax.Array:
    """Returns vectors of length 1, in at least float32; zero stays zero, with gradient 0."""
    return normalize(rows.astype(jnp.promote_types(rows.dtype, jnp.float32)))
