"""Batch statistics that belong to fused weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxtransfer.model import Model, state_of
from jaxtransfer.weights import recompute_statistics


def renewed(
    model: Model,
    variables: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    view: str = "image",
    key: jax.Array | int = 0,
) -> dict[str, Any]:
    """Returns fused variables with batch statistics of their own: `jt.recompute_statistics` where there are any.

    What batch norm kept of one model, or the mean over several, are no statistics of the maps that fused weights give:
    a fused net is evaluated by means and variances that are nobody's. Nets without running state (ViT, MLP) come back
    as they are, and no batch is read.

    Args:
      model: the model.
      variables: the fused `{"params": ..., **state}`.
      batches: of data like those that it is for, of all domains, shuffled; labels are not needed.
      view: the entry that the model sees.
      key: of what the model draws in training.

    Returns:
      The variables.
    """
    if not jax.tree.leaves(state_of(variables)):
        return dict(variables)
    return recompute_statistics(model, variables, batches, view=view, key=key)
