"""Masks and weights: which examples of a batch count, and how much; what can be none is refused where it is seen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError

Batch = Mapping[str, Any]


def mask_of(batch: Batch) -> jax.Array | None:
    """Returns a batch's `mask` [B] in at least float32; None without one.

    Inside of a program values can't be refused: a weight that is negative or not finite becomes NaN there, and so does
    the loss, where as a comparison with 0 it would drop examples in silence.

    Raises:
      InputError: for any other shape than [B]; it is never broadcast.
    """
    return _column(batch, "mask")


def weights_of(batch: Batch, *, besides: tuple[str, ...] = ()) -> jax.Array | None:
    """Returns how much each example counts in a loss, its `weight` times its `mask` [B]; None without either.

    Args:
      batch: the batch.
      besides: entries that the loss reads as something else: a `weight` among them, to be predicted say, is none.

    Raises:
      InputError: as for `mask_of`.
    """
    mask = _column(batch, "mask")
    weight = None if "weight" in besides else _column(batch, "weight")
    if mask is None or weight is None:
        return weight if mask is None else mask
    return mask * jnp.where(mask > 0, weight, 0)  # what stands in a row of padding is no weight


def _column(batch: Batch, name: str) -> jax.Array | None:
    if (column := batch.get(name)) is None:
        return None
    shape = jnp.shape(column)
    unlike = _unlike(name, shape, batch, 1)
    if len(shape) != 1 or unlike:
        raise _misshaped(name, shape, unlike or "[B]")
    weights = jnp.asarray(column)
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    return jnp.where((weights >= 0) & (weights < jnp.inf), weights, jnp.nan)


def check_masks(batch: Any, *, on_host: bool = False) -> None:
    """Raises for a mask anywhere in a batch that isn't one weight for each example, finite and not negative.

    Args:
      batch: a batch, with the masks of its parts: `batch["source"]["mask"]` [B], `batch["support"]["mask"]` [T, S].
      on_host: whether to look at the values of NumPy arrays alone, which costs no transfer.

    Raises:
      InputError: names the mask, and what is wrong with it.
    """
    if not isinstance(batch, Mapping):
        return
    for part in batch.values():
        check_masks(part, on_host=on_host)
    mask = batch.get("mask")
    if mask is None or isinstance(mask, Mapping):
        return
    shape = jnp.shape(mask)
    unlike = _unlike("mask", shape, batch, max(len(shape), 1))
    if not shape or unlike:
        raise _misshaped("mask", shape, unlike or "[B]")
    if not on_host or isinstance(mask, np.ndarray):
        check_weights(mask)


def check_weight(batch: Batch, *, besides: tuple[str, ...] = ()) -> None:
    """Raises for a `weight` with values that are no weights, in rows that the mask keeps; arguments as `weights_of`."""
    weight, mask = batch.get("weight"), batch.get("mask")
    if weight is None or "weight" in besides:
        return
    columns = [column for column in (weight, mask) if isinstance(column, jax.Array)]
    if not all(column.is_fully_addressable for column in columns):
        return  # no process has them all
    weight = np.asarray(weight)
    if mask is not None and np.shape(mask) == weight.shape:
        weight = weight[np.asarray(mask) > 0]
    check_weights(weight, "weight")


def check_weights(mask: Any, what: str = "mask") -> None:
    """Raises for the values of a mask, or of weights, where they are known: they must be finite and not negative."""
    if isinstance(mask, jax.core.Tracer) or (isinstance(mask, jax.Array) and not mask.is_fully_addressable):
        return
    values = np.asarray(mask)
    if not (values.dtype == bool or jnp.issubdtype(values.dtype, jnp.number)) or np.iscomplexobj(values):
        raise InputError(f"{what} must be numbers or booleans; got {values.dtype}")
    if not np.all(good := np.isfinite(values) & (values >= 0)):
        raise InputError(
            f"{what} must be finite and not negative, 0 for an example that does not count and else its weight; got "
            f"{values[~good].ravel()[0]}"
        )


def _unlike(mask: str, shape: tuple[int, ...], batch: Batch, rank: int) -> str | None:
    """Returns an entry that a mask of this shape doesn't fit, or None; `rank` first axes are looked at.

    Parts with examples of their own have their own masks. So may an entry beside the mask have other examples
    (unlabelled ones), where the mask is of another entry's and can't be broadcast.
    """
    arrays = {name: entry for name, entry in batch.items() if not isinstance(entry, Mapping) and name != mask}
    sizes = {name: jnp.shape(leaf)[:rank] for name, entry in arrays.items() for leaf in jax.tree.leaves(entry)}
    owned = shape[:1] != (1,) and any(size[:1] == shape[:1] for size in sizes.values())
    told = {name: size for name, size in sizes.items() if size != shape and (size[:1] == shape[:1] or not owned)}
    by_rank = sorted(told.items(), key=lambda item: len(item[1]))  # labels tell more than images
    return next((f"{size} of {name!r}" for name, size in by_rank), None)


def _misshaped(name: str, shape: tuple[int, ...], expected: str) -> InputError:
    return InputError(
        f"{name} must have one entry per example, as {expected}; got shape {shape}. It is not broadcast: bring it to "
        f"[batch], {name}.reshape(-1) say"
    )
