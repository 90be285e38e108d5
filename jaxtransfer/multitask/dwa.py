"""Dynamic weight average: more for the losses that fell the least of late."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.multitask.kinds import of_values, remembers


def _init(count: int) -> dict[str, jax.Array]:
    zeros = jnp.zeros(count)
    return {"total": zeros, "counted": zeros, "last": zeros, "before": zeros, "updates": jnp.zeros((), jnp.int32)}


@of_values
@remembers(_init)
def dwa(
    gram: Any, values: jax.Array, key: Any, state: Any, *, temperature: float = 2.0, every: int = 100
) -> tuple[jax.Array, Any]:
    """Returns T softmax(r / τ), r_t the mean loss over the last window of updates divided by that over the one before.

    (Liu et al. 2019, arXiv:1803.10704, section 3.3.) All weights are 1 in the first two windows. In the paper and in
    released code a window is an epoch: `every=len(batches)`. Losses of exactly 0, of a task without a label in the
    batch, are not in the mean.

    Args:
      gram: not looked at.
      values: of the losses [T].
      key: nothing is drawn.
      state: sums, counts and means of losses.
      temperature: τ; the larger, the more equal.
      every: updates of a window.

    Returns:
      The weights [T], and the state.

    Raises:
      InputError: for a temperature that is not positive and for an empty window.
    """
    if not temperature > 0 or every < 1:
        raise InputError(f"dwa: expected temperature > 0 and every >= 1; got {temperature} and {every}")
    last, before, updates = state["last"], state["before"], state["updates"]
    rate = jnp.where(before != 0, last / jnp.where(before != 0, before, 1), 1)
    known = updates >= 2 * every
    weights = jnp.where(known, len(values) * jax.nn.softmax(rate / temperature), 1)
    total, counted, updates = state["total"] + values, state["counted"] + (values != 0), updates + 1
    ends = updates % every == 0
    told = ends & (counted > 0)
    return weights, {
        "total": jnp.where(ends, 0, total),
        "counted": jnp.where(ends, 0, counted),
        "last": jnp.where(told, total / jnp.maximum(counted, 1), last),
        "before": jnp.where(told, last, before),
        "updates": updates,
    }
