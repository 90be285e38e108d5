"""Where arrays live: whole on every device, or split by rows over the devices of a mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtransfer import tree
from jaxtransfer.errors import InputError

AXIS = "batch"


class Placement:
    """Places states and batches for a compiled step; the batch is split over all devices of the mesh.

    Args:
      mesh: any mesh, or None for the default device. `jax.make_mesh` gives explicit axes, on which shardings are
        part of the types and every model would have to handle them; the placement uses the same devices as one line
        with an automatic axis.
      mode: `"jit"` or `"pmap"`.
    """

    def __init__(self, mesh: Mesh | None, mode: str):
        if mode not in ("jit", "pmap"):
            raise InputError(f"mode is 'jit' or 'pmap'; got {mode!r}")
        self.mode = mode
        self.devices = self.replicated = self.split = None
        if mode == "pmap" or mesh is not None:
            devices = mesh.devices.ravel() if mesh is not None else np.array(jax.local_devices())
            line = Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
            self.devices = list(devices)
            self.replicated = NamedSharding(line, PartitionSpec())
            self.split = NamedSharding(line, PartitionSpec(AXIS))

    def state(self, state: Any) -> Any:
        """Returns the tree whole on every device; an already placed one is returned as it is."""
        if self.replicated is None:
            return state
        leaves = jax.tree.leaves(state)
        if all(getattr(leaf, "sharding", None) == self.replicated for leaf in leaves):
            return state
        return jax.device_put(state, self.replicated)

    def batch(self, batch: Any) -> Any:
        """Returns the batch on the devices, its rows split over them.

        Raises:
          InputError: where the rows don't divide by the devices.
        """
        if self.devices is None:
            return batch if all(isinstance(x, jax.Array) for x in jax.tree.leaves(batch)) else jax.device_put(batch)
        self._check_divides(batch)
        if self.mode == "pmap":
            count = len(self.devices)
            return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
        return jax.tree.map(self._split, batch)

    def _split(self, rows: Any) -> jax.Array:
        if isinstance(rows, jax.Array):
            return rows if rows.sharding == self.split else jax.device_put(rows, self.split)
        return jax.make_array_from_process_local_data(self.split, np.asarray(rows))

    def _check_divides(self, batch: Any) -> None:
        assert self.devices is not None
        hosts = 1 if self.mode == "pmap" else len({device.process_index for device in self.devices})
        for path, leaf in tree.leaves_by_path(batch).items():
            on_all_hosts = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
            rows = leaf.shape[0] * (1 if on_all_hosts else hosts)
            if rows % len(self.devices):
                raise InputError(
                    f"a batch must divide by the devices: {path!r} has {rows} rows for {len(self.devices)} devices; "
                    f"choose a batch size that is a multiple of {len(self.devices)}"
                )
