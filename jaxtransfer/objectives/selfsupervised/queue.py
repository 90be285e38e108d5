"""A queue of earlier embeddings in the state, and what stands in it of the batch's own examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.objective import Context, named_key, view_of
from jaxtransfer.parts.outputs import pick, shapes_of
from jaxtransfer.parts.rows import gathered, unit


def queue_of(forward: Forward, tap: str, name: str, size: int) -> Callable[..., tuple[Any, Any]]:
    """Returns the setup of a queue of `size` random unit vectors."""

    def setup(key, batch):
        rows = len(jax.tree.leaves(batch)[0])
        if rows > size:
            raise InputError(f"the queue holds {size} vectors, fewer than a batch of {rows}; make it larger")
        dim = pick(f"model {forward.model.name!r}", shapes_of(forward, batch), tap).shape[-1]
        vectors = jax.random.normal(named_key(key, name), (size, dim))
        known = {"index": jnp.full(size, -1, jnp.int32)} if "index" in batch else {}
        return {}, {name: {"keys": unit(vectors), "place": jnp.zeros((), jnp.int32), **known}}

    return setup


def ids_of(queue: Any, batch: Any, ctx: Context) -> tuple[jax.Array, jax.Array] | None:
    """Returns the numbers of the batch's examples and of those in the queue; None where they aren't known."""
    if "index" not in queue or not (ctx.train or "index" in batch):  # other data are evaluated without numbers
        return None
    return view_of(batch, ("index",)).astype(jnp.int32), queue["index"]


def enqueued(queue: Any, found: jax.Array, batch: Any, ctx: Context) -> Any:
    """Returns the queue with all devices' new vectors in the place of the oldest; those whose mask is 0 are skipped."""
    known = {"index": batch["index"]} if "index" in queue else {}
    everywhere, mask = gathered({"key": found, **known}, batch, ctx)
    rows, size, counted = unit(everywhere["key"]), len(queue["keys"]), mask > 0
    offsets = jnp.cumsum(counted) - 1
    places = jnp.where(counted, (queue["place"] + offsets) % size, size)
    keys = queue["keys"].at[places].set(jax.lax.stop_gradient(rows).astype(queue["keys"].dtype), mode="drop")
    place = ((queue["place"] + jnp.sum(counted)) % size).astype(jnp.int32)
    if not known:
        return {"keys": keys, "place": place}
    index = queue["index"].at[places].set(everywhere["index"].astype(jnp.int32), mode="drop")
    return {"keys": keys, "place": place, "index": index}
