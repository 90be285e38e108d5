"""Labels that hold together, as one matrix: a column that is one, or several columns of one label each."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, view_of


def label_columns(label: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the entries of a batch that `label=` names.

    Raises:
      InputError: for what are no names, none, and for one twice.
    """
    names = (label,) if isinstance(label, str) else tuple(label) if isinstance(label, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise InputError(f"label= names an entry of the batch, or several different ones; got {label!r:.80}")
    return names


def label_matrix(batch: Batch, columns: tuple[str, ...]) -> Any:
    """Returns the labels [B, L] of a batch: its entry of that name, or its L entries [B] beside each other.

    Raises:
      InputError: for an entry that isn't there, and for one of several that isn't [B].
    """
    found = [view_of(batch, (name,)) for name in columns]
    if len(found) == 1:
        return found[0]
    for name, values in zip(columns, found, strict=True):
        if jnp.ndim(values) != 1:
            raise InputError(
                f"{name!r} must hold one label, 0 or 1, [batch], to stand beside others; got {jnp.shape(values)}. A "
                f"column of all labels stands alone: label={name!r}"
            )
    return jnp.stack([jnp.asarray(values) for values in found], axis=-1)
