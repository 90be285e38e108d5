"""Weights split over devices: rules by path say which axis of the mesh takes which parameter, and the rest follows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtransfer import tree
from jaxtransfer.errors import InputError

_REMEDY = "an axis of the mesh, jt.devices.fsdp(axis), a PartitionSpec with an entry per dimension, or None"


@dataclasses.dataclass(frozen=True)
class FSDP:
    """A rule: the largest dimension that divides by the axis is split, as far as there is one. Made by `fsdp`.

    Attributes:
      axis: of the mesh.
      smallest: numbers that a parameter has at least to be split.
    """

    axis: str
    smallest: int = 1024


def fsdp(axis: str, *, smallest: int = 1024) -> FSDP:
    """Returns a rule for `shard=`: a parameter's largest dimension that divides by the axis is split over it.

    The first of equals. Parameters without such a dimension, and those of fewer than `smallest` numbers, whose
    transfer takes longer than they are worth, stay whole on each device. `{".*": jt.devices.fsdp("data")}` splits a
    whole model so: weights are gathered where a step reads them, and each device updates its part (Rajbhandari et al.,
    "ZeRO", 2020, arXiv:1910.02054; Zhao et al., "PyTorch FSDP", 2023, arXiv:2304.11277).

    Args:
      axis: a name of the mesh's axes, over which batches are split, too.
      smallest: numbers that a parameter has at least to be split.

    Returns:
      The rule.
    """
    return FSDP(axis, smallest)


Rule = str | FSDP | PartitionSpec | Sequence[Any] | None


class Shards:
    """Where each leaf of a state lies on a mesh, by rules for the parameters.

    The first pattern that selects a parameter says how it is split. A leaf beside the parameters, of an optimiser, an
    average or a frozen tree, lies as the parameter does whose path its own ends with, with or without the model's
    name, and whose shape it has; other frozen leaves by the patterns, as far as they divide; what is left is whole on
    each device.

    Args:
      rules: by pattern: an axis, over which the largest dimension that divides is split; `fsdp(axis)`; an entry per
        dimension, None, an axis or several, as of a `PartitionSpec`; or None, whole.
      mesh: with axes of these names. Batches are split over those that `fsdp` or a bare axis names, and those that no
        rule does; axes that stand in partition specs alone hold parts of layers, unless there are no others.

    Raises:
      InputError: for rules of another kind, or an axis that the mesh lacks.
    """

    def __init__(self, rules: Mapping[str, Rule], mesh: Mesh):
        if not isinstance(rules, Mapping) or not rules:
            raise InputError(f"shard is a dict of patterns, such as {{'.*': jt.devices.fsdp('data')}}; got {rules!r}")
        names = tuple(mesh.axis_names)
        self.mesh = Mesh(mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
        self.rules = {pattern: _checked(rule, pattern, names) for pattern, rule in rules.items()}
        whole = {_axis_of(rule) for rule in self.rules.values()} - {None}
        specs = [rule for rule in self.rules.values() if isinstance(rule, PartitionSpec)]
        parts = {axis for spec in specs for entry in spec for axis in _axes(entry)}
        self.rows = tuple(name for name in names if name in whole or name not in parts) or names
        self.name = (self.mesh, tuple(self.rules.items()))
        self._known: dict[Any, Any] = {}

    def params(self, params: Any) -> dict[str, PartitionSpec]:
        """Returns how each parameter is split, by path.

        Raises:
          InputError: for a pattern that selects nothing, a parameter that none selects, and one that can't be split as
            its pattern says.
        """
        leaves = tree.leaves_by_path(params)
        tree.check_used(self.rules, leaves, "shard")
        specs = {}
        for path, leaf in leaves.items():
            pattern = self._pattern(path)
            if pattern is None:
                raise InputError(
                    f"shard: the patterns {', '.join(map(repr, self.rules))} must cover every parameter, but leave out "
                    f"{path!r}; add a last one for the rest, '.*': None say, which keeps it whole"
                )
            specs[path] = self._spec(self.rules[pattern], np.shape(leaf), f"shard: {path!r}, by {pattern!r},")
        return specs

    def state(self, state: Any) -> Any:
        """Returns a tree of `NamedSharding` of the structure of a training state, which has `params`."""
        key = shape_of(state)
        if key not in self._known:
            self._known[key] = self.follow(state, state.params)
        return self._known[key]

    def follow(self, values: Any, params: Any, *, frozen: bool = False) -> Any:
        """Returns a tree of `NamedSharding` for parameters and values beside; frozen ones may go by the patterns."""
        known = _by_suffix(self.params(params), tree.leaves_by_path(params))

        def of(key_path: tuple, leaf: Any) -> NamedSharding:
            path, shape = tree.path_of(key_path), np.shape(leaf)
            keys = path.split("/")
            for start in range(len(keys)):
                spec = known.get(("/".join(keys[start:]), shape))
                if spec is not None:
                    return self._sharding(spec)
            pattern = self._pattern(path) if frozen else None
            if pattern is None:
                return self._sharding(PartitionSpec())
            try:
                return self._sharding(self._spec(self.rules[pattern], shape, path))
            except InputError:  # a rule for parameters, which happens to select it
                return self._sharding(PartitionSpec())

        return jax.tree_util.tree_map_with_path(of, values)

    def in_use(self, shardings: Any) -> Any:
        """Returns how leaves are split where a step reads them: gathered over the axes that split the batch."""

        def gathered(sharding: NamedSharding) -> NamedSharding:
            left = [tuple(axis for axis in _axes(one) if axis not in self.rows) or None for one in sharding.spec]
            return self._sharding(_as_spec(left))

        return jax.tree.map(gathered, shardings)

    def _pattern(self, path: str) -> str | None:
        return next((pattern for pattern in self.rules if tree.matches(path, pattern)), None)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _size(self, entry: Any) -> int:
        return math.prod(self.mesh.shape[axis] for axis in _axes(entry))

    def _spec(self, rule: Rule, shape: tuple[int, ...], what: str) -> PartitionSpec:
        if rule is None:
            return PartitionSpec()
        if isinstance(rule, str | FSDP):
            axis = _axis_of(rule)
            size = self._size(axis)
            fitting = [dimension for dimension, length in enumerate(shape) if length and length % size == 0]
            if isinstance(rule, FSDP) and (not fitting or math.prod(shape) < rule.smallest):
                return PartitionSpec()
            if not fitting:
                raise InputError(
                    f"{what} has shape {shape}, of which nothing divides by the {size} devices of axis {axis!r}; give "
                    f"it None before, or jt.devices.fsdp({axis!r}), which leaves such ones whole"
                )
            largest = max(fitting, key=lambda dimension: (shape[dimension], -dimension))
            return _as_spec([axis if dimension == largest else None for dimension in range(len(shape))])
        entries = tuple(rule)
        if len(entries) > len(shape):
            raise InputError(f"{what} has shape {shape}, and the rule an entry for each of {len(entries)} dimensions")
        for length, entry in zip(shape, entries, strict=False):
            if length % self._size(entry):
                raise InputError(
                    f"{what} has shape {shape}, of which {length} doesn't divide by the {self._size(entry)} devices of "
                    f"{entry!r}; split another dimension, or give it None before"
                )
        return _as_spec(entries)


def shape_of(values: Any) -> Any:
    """Returns what two trees of one structure and the same shapes have in common, to look them up by."""
    leaves, structure = jax.tree.flatten(values)
    return structure, tuple(np.shape(leaf) for leaf in leaves)


def _checked(rule: Any, pattern: str, names: tuple[str, ...]) -> Rule:
    """Returns a rule, a sequence as a `PartitionSpec`."""
    if isinstance(rule, tuple | list) and not isinstance(rule, PartitionSpec):
        rule = PartitionSpec(*rule)
    if not (rule is None or isinstance(rule, str | FSDP | PartitionSpec)):
        raise InputError(f"shard[{pattern!r}] is {_REMEDY}; got {rule!r}")
    entries = tuple(rule) if isinstance(rule, PartitionSpec) else (_axis_of(rule),)
    used = [axis for entry in entries for axis in _axes(entry)]
    if unknown := [axis for axis in used if axis not in names]:
        raise InputError(
            f"shard[{pattern!r}]: the mesh has no axis {unknown[0]!r}; it has {', '.join(map(str, names))}"
        )
    if len(set(used)) < len(used):
        raise InputError(f"shard[{pattern!r}] splits by an axis twice: {rule!r}")
    return rule


def _axis_of(rule: Rule) -> str | None:
    """Returns the axis of a rule that names one alone."""
    return rule if isinstance(rule, str) else rule.axis if isinstance(rule, FSDP) else None


def _axes(entry: Any) -> tuple[Any, ...]:
    """Returns the axes of an entry of a partition spec."""
    return () if entry is None else tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _as_spec(entries: Sequence[Any]) -> PartitionSpec:
    """Returns a partition spec in the one form that compares equal: no trailing None, an axis alone by its name."""
    forms = [axes[0] if len(axes := _axes(entry)) == 1 else axes or None for entry in entries]
    while forms and forms[-1] is None:
        forms.pop()
    return PartitionSpec(*forms)


def _by_suffix(specs: dict[str, PartitionSpec], leaves: dict[str, Any]) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Returns specs by path and shape, and by the path below the model's name where all models agree there."""
    short: dict[tuple[str, tuple[int, ...]], set[PartitionSpec]] = {}
    for path, spec in specs.items():
        short.setdefault((path.partition("/")[2], np.shape(leaves[path])), set()).add(spec)
    agreed = {key: next(iter(found)) for key, found in short.items() if len(found) == 1 and key[0]}
    return {**agreed, **{(path, np.shape(leaves[path])): spec for path, spec in specs.items()}}
