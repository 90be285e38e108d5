"""What several processes agree on while they compute."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtransfer.devices import processes


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
