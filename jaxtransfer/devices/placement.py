"""Where arrays live: whole on every device, split by rules, or by rows over the devices of a mesh."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtransfer import tree
from jaxtransfer.devices import parts, processes
from jaxtransfer.devices.sharding import Rule, Shards
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
                f"{what}: leaf {path!r} is split over {len(sharding.device_set)} devices, and without rules every "
                f"leaf is whole on each. Say how it is split, shard={{pattern: axis}}, or gather it by jax.device_get"
            )


class Placement:
    """Places states and batches for a compiled step; the batch is split over all devices of the mesh.

    Args:
      mesh: any mesh, or None for the default device, or for all devices of several processes. `jax.make_mesh` gives
        explicit axes, on which shardings are part of the types and every model would have to handle them; the
        placement uses the same devices as one line with an automatic axis, the devices of process 0 first.
      mode: `"jit"` or `"pmap"`.
      shard: rules by which parameters are split over the axes of the mesh, which are kept then; see `Shards`.

    Raises:
      InputError: for another mode, and where several processes train together for `pmap`, or a mesh over some of them;
        for rules without a mesh, or under `pmap`.
    """

    def __init__(self, mesh: Mesh | None, mode: str, shard: Mapping[str, Rule] | None = None):
        if mode not in ("jit", "pmap"):
            raise InputError(f"mode is 'jit' or 'pmap'; got {mode!r}")
        self._several = processes.count() > 1
        if mode == "pmap" and self._several:
            raise InputError(
                f"mode 'pmap' runs in one process, and this is one of {processes.count()}; leave it out: 'jit'"
            )
        self.mode = mode
        self.devices = self.replicated = self.split = self.shards = None
        if shard is not None:
            self.shards = Shards(shard, self._check_shards(mesh))
            self.devices = list(self.shards.mesh.devices.ravel())
            self.replicated = NamedSharding(self.shards.mesh, PartitionSpec())
            self.split = NamedSharding(self.shards.mesh, PartitionSpec(self.shards.rows))
        elif mode == "pmap" or mesh is not None or self._several:
            devices = mesh.devices.ravel() if mesh is not None else np.array(jax.local_devices())
            if self._several:
                devices = processes.in_order(np.array(jax.devices()) if mesh is None else devices)
            line = Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
            self.devices = list(devices)
            self.replicated = NamedSharding(line, PartitionSpec())
            self.split = NamedSharding(line, PartitionSpec(AXIS))

    def _check_shards(self, mesh: Mesh | None) -> Mesh:
        if self.mode == "pmap":
            raise InputError("shard splits weights in one program over the mesh; leave mode='pmap' out: 'jit'")
        if not isinstance(mesh, Mesh):
            raise InputError(
                "shard names axes of a mesh: give mesh=jax.make_mesh((jax.device_count(),), ('data',)) too"
            )
        if self._several:
            processes.in_order(mesh.devices)  # raises
        return mesh

    @functools.cached_property
    def _own_rows(self) -> bool:
        """Whether each process holds the rows of a batch that it makes, as where no rule says otherwise."""
        return self.shards is None or self.split is None or parts.own_rows(self.split, self._row_parts)

    @functools.cached_property
    def _row_parts(self) -> int:
        """In how many parts the rows of a batch lie."""
        assert self.devices is not None
        if self.shards is None:
            return len(self.devices)
        return math.prod(self.shards.mesh.shape[axis] for axis in self.shards.rows)

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

    def state(self, state: Any) -> Any:
        """Returns a state where it lives: whole on every device, or split by the rules; a placed one as it is.

        Raises:
          InputError: names a leaf that is split without rules, or that the rules can't split.
        """
        if self.shards is None:
            return self.whole(state, "state")
        leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(self.shards.state(state))
        if all(getattr(leaf, "sharding", None) == one for leaf, one in zip(leaves, wanted, strict=True)):
            return state
        return jax.tree.unflatten(jax.tree.structure(state), [*map(self._laid, leaves, wanted)])

    def _laid(self, leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return parts.laid(leaf, sharding) if self._several else jax.device_put(leaf, sharding)

    def stored(self, values: Any, params: Any) -> Any:
        """Returns values of a program split as the parameters of their paths are stored."""
        if self.shards is None:
            return values
        return jax.lax.with_sharding_constraint(values, self.shards.follow(values, params))

    def read(self, values: Any, params: Any, *, frozen: bool = False) -> Any:
        """Returns values of a program as it computes with them: gathered over the axes that split the batch.

        Without that the compiler may as well move the batch to the weights.
        """
        if self.shards is None:
            return values
        stored = self.shards.follow(values, params, frozen=frozen)
        return jax.lax.with_sharding_constraint(values, self.shards.in_use(stored))

    def _everywhere(self, values: Any) -> Any:
        assert self.replicated is not None
        return processes.put(values, self.replicated) if self._several else jax.device_put(values, self.replicated)

    def frozen(self, handles: Sequence[Frozen], params: Any = None) -> tuple[Any, ...]:
        """Returns the frozen trees where they live; each array is written there once, whoever asks.

        Args:
          handles: on the trees.
          params: the parameters, as whose they are split where there are rules.
        """
        if self.shards is not None:
            return self._split_frozen(self.shards, handles, params)
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

    def _split_frozen(self, shards: Shards, handles: Sequence[Frozen], params: Any) -> tuple[Any, ...]:
        known: dict[Any, Any] = {}
        for handle in handles:
            if shards.name in handle.placed:
                there = jax.tree.leaves(handle.placed[shards.name])
                known |= {id(leaf): one for leaf, one in zip(jax.tree.leaves(handle.tree), there, strict=True)}
        for handle in handles:
            if shards.name not in handle.placed:
                leaves, structure = jax.tree.flatten(handle.tree)
                where = jax.tree.leaves(shards.follow(handle.tree, params, frozen=True))
                for leaf, sharding in zip(leaves, where, strict=True):
                    if id(leaf) not in known:
                        known[id(leaf)] = self._laid(leaf, sharding)
                handle.placed[shards.name] = jax.tree.unflatten(structure, [known[id(leaf)] for leaf in leaves])
        return tuple(handle.placed[shards.name] for handle in handles)

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
        assert self.split is not None
        rows = np.asarray(rows)
        if self._own_rows:
            return jax.make_array_from_process_local_data(self.split, rows)
        whole = processes.gathered(rows)  # layers are split over processes, which then need the same rows
        return jax.make_array_from_callback(whole.shape, self.split, lambda index: whole[index])

    def _check_divides(self, batch: Any, *, traced: bool = False) -> None:
        assert self.devices is not None
        count = self._row_parts
        hosts = 1 if self.mode == "pmap" else len({device.process_index for device in self.devices})
        for path, leaf in tree.leaves_by_path(batch).items():
            on_all_hosts = traced or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
            rows = leaf.shape[0] * (1 if on_all_hosts else hosts)
            if rows % count:
                raise InputError(
                    f"a batch must divide by the devices: {path!r} has {rows} rows for {count} devices; choose a batch "
                    f"size that is a multiple of {count}"
                )
