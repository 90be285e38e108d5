"""A mesh over what devices there are."""

import jax
import numpy as np

from jaxtransfer.devices import processes


def device_mesh() -> jax.sharding.Mesh | None:
    """Returns a mesh over all devices of all processes, its axis called `data`, or None where there is one device."""
    if processes.count() < jax.process_count():  # alone meanwhile
        return (
            None
            if jax.local_device_count() == 1
            else jax.make_mesh((jax.local_device_count(),), ("data",), devices=jax.local_devices())
        )
    count = jax.device_count()
    if jax.process_count() > 1:
        return jax.sharding.Mesh(processes.in_order(np.array(jax.devices())), ("data",))
    return None if count == 1 else jax.make_mesh((count,), ("data",))
