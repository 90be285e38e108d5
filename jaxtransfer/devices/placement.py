"""Where arrays live: whole on every device, or split by rows over the devices of a mesh."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtransfer import tree
from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError
from jaxtransfer.parts.masking import check_masks
from jaxtransfer.weights import Frozen

AXIS = "batch"


def check_whole(values: Any, what: str) -> None:
    """Raises for a leaf that is split over devices, which the training would silently make whole on each."""
    for path, leaf in tree.leaves_by_path(values).items():
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.Sharding) and not sharding.is_fully_replicated:
            raise InputError(
                f"{what}: leaf {path!r} is split over {len(sharding.device_set)} devices, and training keeps every "
                f"leaf whole on each; there are no rules for split weights yet. Gather them first, by jax.device_get"
            )


class Placement:
    """Places states and batches for a compiled step; the batch is split over all devices of the mesh.

    Args:
      mesh: any mesh, or None for the default device, or for all devices of several processes. `jax.make_mesh` gives
        explicit axes, on which shardings are part of the types and every model would have to handle them; the
        placement uses the same devices as one line with an automatic axis, the devices of process 0 first.
      mode: `"jit"` or `"pmap"`.

    Raises:
      InputError: for another mode, and where several processes train together for `pmap`, or a mesh over some of them.
    """

    def __init__(self, mesh: Mesh | None, mode: str):
        if mode not in ("jit", "pmap"):
            raise InputError(f"mode is 'jit' or 'pmap'; got {mode!r}")
        self._several = processes.count() > 1
        if mode == "pmap" and self._several:
            raise InputError(
                f"mode 'pmap' runs in one process, and this is one of {processes.count()}; leave it out: 'jit'"
            )
        self.mode = mode
        self.devices = self.replicated = self.split = None
        if mode == "pmap" or mesh is not None or self._several:
            devices = mesh.devices.ravel() if mesh is not None else np.array(jax.local_devices())
            if self._several:
                devices = processes.in_order(np.array(jax.devices()) if mesh is None else devices)
            line = Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
            self.devices = list(devices)
            self.replicated = NamedSharding(line, PartitionSpec())
            self.split = NamedSharding(line, PartitionSpec(AXIS))

    @functools.cached_property
    def where_cpus_are_several(self) -> bool:
        """Whether programs run on CPU devices, on one or more of several that this process has."""
        platform = self.devices[0].platform if self.devices else jax.default_backend()
        return platform == "cpu" and (self._several or jax.local_device_count("cpu") > 1)

    def whole(self, values: Any, what: str | None = None) -> Any:
        """Returns a tree (a state, frozen weights) whole on every device; an already placed one as it is.

        Args:
          values: the tree.
          what: what to call it where a leaf that is split over devices is an error; data may be split, and are made
            whole.

        Raises:
          InputError: names the leaf that is split.
        """
        if self.replicated is None:
            return values
        leaves = jax.tree.leaves(values)
        if all(getattr(leaf, "sharding", None) == self.replicated for leaf in leaves):
            return values
        if what is not None:  # only here, so that a step on a state of its own does no more than before
            check_whole(values, what)
        return self._everywhere(values)

    def _everywhere(self, values: Any) -> Any:
        assert self.replicated is not None
        return processes.put(values, self.replicated) if self._several else jax.device_put(values, self.replicated)

    def frozen(self, handles: Sequence[Frozen]) -> tuple[Any, ...]:
        """Returns the frozen trees whole on every device; each array is written there once, whoever asks."""
        known: dict[int, Any] = {}  # what is there already, by leaf: a delta's base may be a teacher's weights, too
        for handle in handles:
            if self.replicated in handle.placed:
                placed = jax.tree.leaves(handle.placed[self.replicated])
                known |= {id(leaf): there for leaf, there in zip(jax.tree.leaves(handle.tree), placed, strict=True)}
        for handle in handles:
            if self.replicated not in handle.placed:
                leaves, structure = jax.tree.flatten(handle.tree)
                new = {id(leaf): leaf for leaf in leaves if id(leaf) not in known}
                if self.replicated is not None:
                    check_whole(handle.tree, "frozen weights")
                known |= self.whole(jax.device_put(new))
                handle.placed[self.replicated] = jax.tree.unflatten(structure, [known[id(leaf)] for leaf in leaves])
        return tuple(handle.placed[self.replicated] for handle in handles)

    def batch(self, batch: Any) -> Any:
        """Returns the batch on the devices, its rows split over them.

        Raises:
          InputError: where the rows don't divide by the devices, and for a mask that can be none.
        """
        check_masks(batch, on_host=True)
        if self.devices is None:
            return batch if all(isinstance(x, jax.Array) for x in jax.tree.leaves(batch)) else jax.device_put(batch)
        self._check_divides(batch)
        return jax.tree.map(self._stack if self.mode == "pmap" else self._split, batch)

    def share(self, batch: Any) -> Any:
        """Returns this device's share of a batch drawn inside the program; under `jit` the whole, its rows split."""
        if self.devices is None:
            return batch
        self._check_divides(batch, traced=True)
        if self.mode == "jit":
            return jax.lax.with_sharding_constraint(batch, self.split)
        index, count = jax.lax.axis_index(AXIS), len(self.devices)

        def rows(x):
            size = x.shape[0] // count
            return jax.lax.dynamic_slice_in_dim(x, index * size, size)

        return jax.tree.map(rows, batch)

    def _stack(self, rows: Any) -> Any:
        assert self.devices is not None
        if isinstance(rows, jax.Array):  # off the mesh it may be on, whose explicit axes a reshape would have to name
            rows = jax.device_put(rows, self.split)
        return rows.reshape(len(self.devices), rows.shape[0] // len(self.devices), *rows.shape[1:])

    def _split(self, rows: Any) -> jax.Array:
        if isinstance(rows, jax.Array):
            if rows.sharding == self.split:
                return rows
            if not self._several:
                return jax.device_put(rows, self.split)
        return jax.make_array_from_process_local_data(self.split, np.asarray(rows))

    def _check_divides(self, batch: Any, *, traced: bool = False) -> None:
        assert self.devices is not None
        hosts = 1 if self.mode == "pmap" else len({device.process_index for device in self.devices})
        for path, leaf in tree.leaves_by_path(batch).items():
            on_all_hosts = traced or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
            rows = leaf.shape[0] * (1 if on_all_hosts else hosts)
            if rows % len(self.devices):
                raise InputError(
                    f"a batch must divide by the devices: {path!r} has {rows} rows for {len(self.devices)} devices; "
                    f"choose a batch size that is a multiple of {len(self.devices)}"
                )
