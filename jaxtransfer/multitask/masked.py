"""Missing labels: a task counts the examples that have one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective, view_of
from jaxtransfer.terms import result_of


def masked(objective: Objective, column: str) -> Objective:
    """Returns the same objective on the examples that a column of the batch says to have its label.

        left = jt.classification(net, output="left", label="left").named("left")
        tasks = jt.multitask.masked(left, "has_left") + ...

    The column, one number or boolean for each example, times the batch's `mask`, where it has one, is the mask that the
    objective sees: of the others no value, no metric and no gradient is taken, whatever stands in the place of their
    labels. They are left out of the mean, so that a rare label weighs as much as a frequent one; a batch without any
    gives a loss and a gradient of 0, and the rules of `jt.balance` leave such a task out: what the others get, and what
    a rule remembers, is as without it.

    Args:
      objective: one that reads `mask`, as those of `jt` do, or a sum of them.
      column: the entry of the batch [B]; 0 leaves out.

    Raises:
      InputError: when run, for a batch without the column, and for one of another shape.
    """

    def wrapped(term: Objective) -> Objective:
        def loss(outputs, params, state, batch, ctx):
            return result_of(term, outputs, params, state, _known(batch, column, jnp), ctx)

        def check(outputs, batch):
            term.check(outputs, _known(batch, column, np))

        return dataclasses.replace(term, loss=loss, check=check)

    if not objective.is_sum:
        return wrapped(objective)
    total = objective.summed.each(wrapped)
    return dataclasses.replace(objective, loss=total, setup=total.setup, check=total.check)


def _known(batch: Batch, column: str, numbers: Any) -> dict[str, Any]:
    """Returns a batch whose mask is its own times a column, as arrays of NumPy or JAX."""
    if column not in batch:
        raise InputError(f"masked: the batch has no column {column!r}; it has {', '.join(map(str, batch))}")
    entries = [batch[name] for name in ("mask", column) if name in batch]
    if numbers is np and any(isinstance(one, jax.Array) and not one.is_fully_addressable for one in entries):
        return dict(batch)  # no process has them all
    known = numbers.asarray(view_of(batch, (column,)))
    known = known.astype(numbers.promote_types(known.dtype, np.float32))
    if (mask := batch.get("mask")) is not None:
        if numbers.shape(mask) != known.shape:
            expected = numbers.shape(mask)
            raise InputError(f"masked: {column!r} must have one entry per example, {expected}; got {known.shape}")
        known = known * (numbers.asarray(mask) > 0) * mask
    return {**batch, "mask": known}
