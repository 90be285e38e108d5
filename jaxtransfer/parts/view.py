"""What a model or a term reads of a batch, by its path; what is missing is told with its likely cause."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxtransfer.errors import InputError


class MissingViewError(InputError):
    """A batch lacks what is read of it."""


def _cause(batch: Any, missing: tuple[str, ...], depth: int) -> str:
    """Returns the likely reason why a batch lacks an entry, as a half sentence; "" where none is known."""
    if depth or not isinstance(batch, Mapping):
        return ""
    if missing == ("label",) and "image" in batch:
        return "; mixup without classes= drops the labels: mixup(alpha, classes=10)"
    if missing == ("image",):
        likely = [name for name, value in batch.items() if name in ("features", "tokens") and hasattr(value, "shape")]
        return f"; name what the model reads: view={likely[0]!r}" if len(likely) == 1 else ""
    return ""


def view_of(batch: Mapping[str, Any], view: tuple[str, ...]) -> Any:
    """Returns the entry of a batch at a path; a missing key is an error that lists those there are.

    Args:
      batch: of any nesting.
      view: the keys, from the outside to the inside.

    Raises:
      MissingViewError: where there is none.
    """
    for depth, key in enumerate(view):
        if not isinstance(batch, Mapping) or key not in batch:
            have = sorted(batch) if isinstance(batch, Mapping) else f"an array {jnp.shape(batch)}"
            what = f"the objective reads batch[{'/'.join(view[: depth + 1])!r}], but the batch has {have}"
            raise MissingViewError(what + _cause(batch, view[depth:], depth))
        batch = batch[key]
    return batch
