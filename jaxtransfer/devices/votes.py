"""What several processes agree on, or tell each other."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtransfer.devices import processes

_LEAST = 4096  # bytes that are gathered at once


class Votes:
    """The largest of the numbers that the processes give: what they agree on, asked for while the devices work.

    Args:
      lag: how many calls later the answer is read, by when the devices have it.
    """

    def __init__(self, lag: int = 2):
        line = Mesh(processes.in_order(np.array(jax.devices())), ("devices",))
        self._split, self._lag = NamedSharding(line, PartitionSpec("devices")), lag
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(line, PartitionSpec()))
        self._cast: list[jax.Array] = []

    def agreed(self, number: int) -> int:
        """Gives a number of this process; returns the largest one of some calls ago, 0 before."""
        own = np.full(jax.local_device_count(), number, np.int32)
        self._cast.append(self._largest(jax.make_array_from_process_local_data(self._split, own)))
        return int(self._cast.pop(0)) if len(self._cast) > self._lag else 0


def all_tell(work: Callable[[], Any]) -> list[Any]:
    """Returns what `work()` gives in each process, JSON types, in their order; each calls it, alone.

    Raises:
      InputError: in all processes, where it raised an error in one of them: the first one's, as it was told.
    """
    if processes.count() == 1:
        return [work()]
    try:
        with processes.alone():
            text = json.dumps({"value": work()})
    except Exception as error:
        text = json.dumps({"error": str(error) or type(error).__name__})
    told = [json.loads(one) for one in _of_all(text.encode())]
    for one in told:
        if "error" in one:
            raise processes.ToldError(one["error"])
    return [one["value"] for one in told]


def _of_all(text: bytes) -> list[bytes]:
    """Returns the texts of all processes; their programs are few, as they are gathered in sizes of powers of two."""
    sizes = multihost_utils.process_allgather(np.array([len(text)], np.int32))
    whole = np.zeros(max(_LEAST, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    whole[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(whole)).astype(np.uint8)
    return [row[:size].tobytes() for row, size in zip(rows, sizes.ravel(), strict=True)]
