"""A queue for each class of earlier vectors in the state: an example takes the place of its class's oldest."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.objective import Context
from jaxtransfer.parts.rows import gathered, unit


def empty_queues(classes: int, size: int, dims: Mapping[str, int]) -> dict[str, Any]:
    """Returns queues of `size` vectors for each class, of several kinds side by side; no place is taken yet.

    Returns:
      `{kind: [classes · size, dim], "label": [classes · size], "place": [classes]}`: -1 is the label of a place that is
      free, `place` the number of a class's place that is filled next.
    """
    rows = classes * size
    kinds = {kind: jnp.zeros((rows, dim)) for kind, dim in dims.items()}
    return {**kinds, "label": jnp.full(rows, -1, jnp.int32), "place": jnp.zeros(classes, jnp.int32)}


def enqueued(queue: Mapping[str, Any], found: Mapping[str, jax.Array], labels: jax.Array, batch: Any, ctx: Context):
    """Returns the queues with all devices' new vectors, at length 1, in the places of their classes' oldest.

    Those whose mask is 0 or whose label is no class are skipped; of more than a queue holds its last ones stay.

    Args:
      queue: of `empty_queues`.
      found: the new vectors by kind, [B, dim].
      labels: integers [B].
      batch: the batch, whose mask counts.
      ctx: the context of the term.
    """
    rows, mask = gathered({**found, "label": labels}, batch, ctx)
    classes = len(queue["place"])
    size = len(queue["label"]) // classes
    label = rows.pop("label").astype(jnp.int32)
    member = (label[:, None] == jnp.arange(classes)[None]) & (mask > 0)[:, None]
    number = jnp.cumsum(member, axis=0, dtype=jnp.int32) - 1
    count = jnp.sum(member, axis=0, dtype=jnp.int32)
    stays = member & (number >= (count - size)[None])
    place = jnp.arange(classes)[None] * size + (queue["place"][None] + number) % size
    places = jnp.where(jnp.any(stays, axis=1), jnp.sum(jnp.where(stays, place, 0), axis=1), classes * size)
    new = {kind: jax.lax.stop_gradient(unit(values)) for kind, values in rows.items()} | {"label": label}
    kinds = {kind: queue[kind].at[places].set(x.astype(queue[kind].dtype), mode="drop") for kind, x in new.items()}
    return {**kinds, "place": (queue["place"] + count) % size}
