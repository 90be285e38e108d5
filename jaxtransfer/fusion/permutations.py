"""Which axes of a network's leaves can be permuted together without a change of what it computes: plain data.

A specification names, for each leaf by its path, what permutes each of its axes:

    {"stage1/kernel": (None, "hidden"), "stage1/bias": ("hidden",), "head/kernel": ("hidden", None), "head/bias": None}

An entry of an axis is None (it stays), a name (the permutation of all its places), or `{name: places}`, where only some
places are permuted or each item has several: `places` [n] or [n, r] says where the items stand. The first layer behind
a flattened map [H, W, C] has `{"conv": [[c, c + C, c + 2 * C, ...], ...]}`. A leaf that stays as a whole has None.
Paths begin below `params` and the other collections, so that one specification serves the parameters and the variables.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.leaves import like

Places = Sequence[int] | Sequence[Sequence[int]] | np.ndarray
Axis = str | Mapping[str, Places] | None
Specification = Mapping[str, Sequence[Axis] | None]
VECTORS = ("bias", "scale", "mean", "var")  # of the outputs of a layer, one number each


def permuted(variables: Any, specification: Specification, permutations: Mapping[str, Any]) -> Any:
    """Returns the same network with its units in another order: item i of each axis is the old item p[i].

    Batch statistics and other running state move with their units.

    Args:
      variables: parameters, or variables `{"params": ..., **state}`.
      specification: see `jt.fusion.permutations`.
      permutations: by name, integers [n]; names that are missing stay.

    Raises:
      InputError: where the specification doesn't cover the tree, or something is no permutation of its axis.
    """
    sizes = permutation_sizes(variables, specification)
    for name, order in permutations.items():
        if name not in sizes:
            raise InputError(f"no axis is permuted by {name!r}; there are {tree.listed(sizes)}")
        if not np.array_equal(np.sort(np.asarray(order)), np.arange(sizes[name])):
            raise InputError(f"{name!r} must be a permutation of {sizes[name]} items; got {order!r:.80}")

    def moved(key_path, leaf):
        value = None
        for axis, name, places in placed(tree.path_of(key_path), leaf, variables, specification):
            if name in permutations:
                value = np.asarray(jax.device_get(leaf)) if value is None else value
                value = reordered(value, axis, places, np.asarray(permutations[name]))
        return leaf if value is None else like(value, leaf)

    return jax.tree_util.tree_map_with_path(moved, variables)


def permutation_sizes(variables: Any, specification: Specification) -> dict[str, int]:
    """Returns how many items each permutation has, by name, in the order of the specification.

    Raises:
      InputError: where a leaf is not in the specification, or is of another rank; where an entry of it is no leaf; for
        axes that cannot share a permutation; and for what can't be the same network: units that nothing reads or
        nothing gives, and a bias or norm in another order than the kernel beside it. (A specification can be wrong in
        other ways, with axes of one size confused: compare what the network gives before and after.)
    """
    paths = {below(path, variables): (path, leaf) for path, leaf in tree.leaves_by_path(variables).items()}
    if missing := [path for path in paths if path not in specification]:
        raise InputError(
            f"the specification must say of every leaf what permutes its axes, but leaves out {tree.listed(missing)}; "
            f"a leaf that stays has None"
        )
    sizes: dict[str, int] = {}
    whose: dict[str, str] = {}
    for known in specification:
        if known not in paths:
            if _is_statistic(known, paths):  # of parameters alone
                continue
            raise InputError(f"the specification has {known!r}, which is no leaf; there are {tree.listed(paths)}")
        path, leaf = paths[known]
        for _, name, places in placed(path, leaf, variables, specification):
            if sizes.setdefault(name, len(places)) != len(places):
                raise InputError(
                    f"{name!r} permutes {sizes[name]} items of {whose[name]!r}, but {len(places)} of {known!r}"
                )
            whose.setdefault(name, known)
    _check_whole(paths, variables, specification)
    return sizes


def _check_whole(paths: Mapping[str, tuple[str, Any]], variables: Any, specification: Specification) -> None:
    """Raises for permutations that only a part of what they concern follows."""
    spots: dict[str, list[str]] = {}
    orders: dict[str, dict[str, Any]] = {}  # of the outputs of each layer, by leaf
    for known, (path, leaf) in paths.items():
        layer, _, kind = known.rpartition("/")
        own = {}
        for axis, name, places in placed(path, leaf, variables, specification):
            spots.setdefault(name, []).extend([known] * (leaf.ndim > 1))
            if axis == leaf.ndim - 1:
                own[name] = places.tolist()
        if (kind == "kernel" and leaf.ndim > 1) or (kind in VECTORS and leaf.ndim == 1):
            orders.setdefault(f"{layer} of {leaf.shape[-1]}", {})[known] = own
    for name, found in spots.items():
        if len(found) < 2:
            where = f"of {found[0]!r} alone" if found else "of vectors alone"
            raise InputError(
                f"{name!r} permutes an axis {where}, so the network would compute something else: the specification "
                f"must name it both where the units come from and where they are read"
            )
    for own in orders.values():
        first = next(iter(own))
        if other := next((known for known in own if own[known] != own[first]), None):
            raise InputError(
                f"{first!r} and {other!r} belong to the same units, but the specification permutes them otherwise"
            )


def placed(path: str, leaf: Any, variables: Any, specification: Specification) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (axis, name, places [n, r]) for each permutation of a leaf's axes."""
    known = below(path, variables)
    entries = specification[known]
    if entries is None:
        return
    if len(entries) != leaf.ndim:
        raise InputError(f"the specification has {len(entries)} axes for {known!r}, which is {list(leaf.shape)}")
    for axis, entry in enumerate(entries):
        size = leaf.shape[axis]
        for name, places in ({entry: np.arange(size)} if isinstance(entry, str) else entry or {}).items():
            found = np.asarray(places, np.int64)
            found = found.reshape(len(found), -1)
            if found.size and (found.min() < 0 or found.max() >= size or len(np.unique(found)) != found.size):
                raise InputError(f"{name!r}: places of axis {axis} of {known!r} must be distinct and below {size}")
            yield axis, name, found


def reordered(value: np.ndarray, axis: int, places: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns an array with the items at some places of an axis in another order."""
    index = np.arange(value.shape[axis])
    index[places] = places[order]
    return np.take(value, index, axis=axis)


def below(path: str, variables: Any) -> str:
    """Returns a leaf's path without its collection, where the tree has such."""
    return path.split("/", 1)[1] if isinstance(variables, Mapping) and "params" in variables else path


def _is_statistic(path: str, paths: Mapping[str, Any]) -> bool:
    layer, _, name = path.rpartition("/")
    return name in ("mean", "var") and any(other.rpartition("/")[0] == layer for other in paths)
