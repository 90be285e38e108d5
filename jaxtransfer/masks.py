"""Masks: which examples of a batch count, and how much; what can be none is refused wherever a batch is seen."""

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
    if (mask := batch.get("mask")) is None:
        return None
    shape = jnp.shape(mask)
    rows = {name: size for name, size in _leading(batch, 1).items() if name != "mask"}
    if len(shape) != 1 or any(size != shape for size in rows.values()):
        raise _misshaped(shape, next((f"{size} of {name!r}" for name, size in rows.items() if size != shape), "[B]"))
    weights = jnp.asarray(mask)
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
    for name, size in _leading(batch, max(len(shape), 1)).items():
        if not shape or size != shape:
            raise _misshaped(shape, f"{size} of {name!r}")
    if not on_host or isinstance(mask, np.ndarray):
        check_weights(mask)


def check_weights(mask: Any) -> None:
    """Raises for the values of a mask where they are known: they must be finite and not negative."""
    if isinstance(mask, jax.core.Tracer) or (isinstance(mask, jax.Array) and not mask.is_fully_addressable):
        return
    values = np.asarray(mask)
    if not (values.dtype == bool or jnp.issubdtype(values.dtype, jnp.number)) or np.iscomplexobj(values):
        raise InputError(f"mask must be numbers or booleans; got {values.dtype}")
    if not np.all(good := np.isfinite(values) & (values >= 0)):
        raise InputError(
            f"mask must be finite and not negative, 0 for an example that does not count and else its weight; got "
            f"{values[~good].ravel()[0]}"
        )


def _leading(batch: Batch, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the first axes of the arrays beside a mask; parts with examples of their own have their own masks."""
    arrays = {name: entry for name, entry in batch.items() if not isinstance(entry, Mapping)}
    sizes = {name: jnp.shape(leaf)[:rank] for name, entry in arrays.items() for leaf in jax.tree.leaves(entry)}
    return dict(sorted(sizes.items(), key=lambda item: len(item[1])))  # labels tell more than images


def _misshaped(shape: tuple[int, ...], expected: str) -> InputError:
    return InputError(
        f"mask must have one entry per example, as {expected}; got shape {shape}. It is not broadcast: bring it to "
        f"[batch], mask.reshape(-1) say"
    )
