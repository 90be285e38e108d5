"""Values that are split over the devices of several processes: laid out there, and brought together again."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtransfer.devices import processes


def is_split(leaf: Any) -> bool:
    """Returns whether no process has all of an array, so that one alone can't compute with it."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def laid(leaf: Any, sharding: NamedSharding, dtype: Any = None) -> jax.Array:
    """Returns an array on the devices of a sharding, each part of it memory of its own.

    Of several processes each has all of the values, or they have an array in common. A key goes there as its data,
    which is what JAX can place over processes.

    Args:
      leaf: an array, of NumPy or JAX.
      sharding: where it is to lie.
      dtype: of the result; by default the array's own.
    """
    if processes.count() == 1:
        if dtype is None:
            return jax.device_put(leaf, sharding, may_alias=False)
        return jax.device_put(np.asarray(leaf).astype(dtype), sharding, may_alias=False)
    if processes.is_key(leaf):
        data = laid(jax.random.key_data(processes.local(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if is_split(leaf):
        there = leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
        return jax.numpy.array(there, dtype or leaf.dtype, copy=True)
    whole = np.asarray(processes.local(leaf))
    whole = whole if dtype is None else whole.astype(dtype)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index], copy=True))


def within_reach(values: Any) -> Any:
    """Returns a tree with which a process can compute alone; all processes ask for it at once.

    What is whole on each device stays there, as this process has it on one of its own; what is split becomes whole, a
    NumPy array in the memory of each host.
    """
    return jax.tree.map(lambda leaf: processes.on_host(leaf) if is_split(leaf) else processes.local(leaf), values)


def own_rows(split: NamedSharding, parts: int) -> bool:
    """Returns whether the rows of a batch that a process makes are those that its devices hold, and no others.

    Args:
      split: how the rows lie.
      parts: into how many of them a batch is split.
    """
    count = processes.count()
    if parts % count:
        return False
    each = parts // count
    held: dict[int, set[int]] = {}
    for device, index in split.devices_indices_map((parts,)).items():
        held.setdefault(device.process_index, set()).update(range(*index[0].indices(parts)))
    return all(held.get(one) == set(range(one * each, (one + 1) * each)) for one in range(count))
