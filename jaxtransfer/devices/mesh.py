"""A mesh over what devices there are."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError


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


def named_mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """Returns a mesh over all devices of all processes with axes of these sizes; the first one spans the processes.

    Raises:
      InputError: for sizes that make another number of devices.
    """
    devices = np.array(jax.devices())
    if math.prod(sizes.values()) != len(devices):
        raise InputError(f"a mesh over all {len(devices)} devices has axes of that product; got {dict(sizes)}")
    if jax.process_count() > 1:
        devices = processes.in_order(devices)
    return jax.sharding.Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))
