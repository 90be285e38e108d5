"""Git Re-Basin: the units of one network put in the order of another's, so that the two can be averaged."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.leaves import check_alike, check_finite, is_mixed, is_state, wide
from jaxtransfer.fusion.permutations import Specification, permutation_sizes, permuted, placed, reordered


class _Spot(NamedTuple):
    """Where a permutation acts: an axis of a leaf, its items' places there, and what permutes the other axes."""

    path: str
    axis: int
    places: np.ndarray
    beside: frozenset[str]


def rebasin(reference: Any, model: Any, specification: Specification, *, sweeps: int = 100) -> Any:
    """Returns `model` with its units in the order in which they are nearest to the reference's: the same function.

    (Ainsworth et al. 2023, arXiv:2209.04836, weight matching.) Batch statistics move with their units. Two networks
    that were trained apart can then be averaged:

        aligned = jt.fusion.rebasin(one, other, jt.fusion.specification(one))
        middle = jt.fusion.renewed(model, jt.fusion.average([one, aligned]), batches)

    Args:
      reference: the network whose order is wanted.
      model: of the same architecture.
      specification: what can be permuted: `jt.fusion.specification(reference)` for networks of `jt.models`, otherwise
        plain data, see `jt.fusion.permutations`.
      sweeps: at most so many passes over all permutations.

    Raises:
      InputError: for another architecture, for weights that are not finite, and for a specification that does not fit.
    """
    return permuted(model, specification, weight_matching(reference, model, specification, sweeps=sweeps))


def weight_matching(
    reference: Any, model: Any, specification: Specification, *, sweeps: int = 100
) -> dict[str, np.ndarray]:
    """Returns the permutations that bring a model nearest to the reference, a local maximum of Σ ⟨w_ref, P w⟩.

    One permutation after another is the optimum of a linear assignment, the others held, until none gains (Ainsworth
    et al. 2023, arXiv:2209.04836, algorithm 1). It is begun twice, and the better end counts: from the order as it is,
    and from the input on, each permutation by those leaves alone whose other axes are settled. The latter finds the
    order of a permuted copy exactly, as long as no two units are the same. Nothing is drawn.

    Args:
      reference: the network whose order is wanted.
      model: of the same architecture.
      specification: what can be permuted.
      sweeps: at most so many passes over all permutations, from either beginning.

    Returns:
      Integers [n] by name, for `jt.fusion.permuted`.

    Raises:
      InputError: for another architecture, for weights that are not finite, and for a specification that does not fit.
    """
    names = ("the reference", "the model")
    check_alike([reference, model], names=names)
    check_finite([reference, model], names=names)
    sizes = permutation_sizes(reference, specification)
    if sweeps < 1:
        raise InputError(f"sweeps must be at least 1; got {sweeps}")
    first = _Matching(reference, model, specification, sizes)
    first.settle()
    if first.complete():
        return first.orders
    second = _Matching(reference, model, specification, sizes)
    for matching in (first, second):
        matching.climb(sweeps)
    return max(first, second, key=lambda matching: matching.value()).orders


class _Matching:
    """A search for permutations: the present ones, and the model's leaves so permuted."""

    def __init__(self, reference: Any, model: Any, specification: Specification, sizes: dict[str, int]):
        self.orders = {name: np.arange(size) for name, size in sizes.items()}
        self.goal: dict[str, np.ndarray] = {}
        self.leaves: dict[str, np.ndarray] = {}
        self.spots: dict[str, list[_Spot]] = {name: [] for name in sizes}
        theirs = tree.leaves_by_path(model)
        for path, leaf in tree.leaves_by_path(reference).items():
            if not is_mixed(leaf) or is_state(reference, path):
                continue
            self.goal[path], self.leaves[path] = wide(leaf), wide(theirs[path])
            axes = list(placed(path, leaf, reference, specification))
            for axis, name, places in axes:
                beside = frozenset(other for at, other, _ in axes if at != axis)
                self.spots[name].append(_Spot(path, axis, places, beside))

    def value(self) -> float:
        """Returns Σ ⟨w_ref, P w⟩."""
        return self._products(self.goal)

    def complete(self) -> bool:
        """Returns whether the model is the reference now, which nothing is nearer to."""
        return all(np.array_equal(self.goal[path], self.leaves[path]) for path in self.goal)

    def settle(self) -> None:
        """Settles the permutations one by one, first that of which most is known by those that are settled."""
        left = list(self.orders)
        while left:
            ready = {name: [s for s in self.spots[name] if not s.beside.intersection(left)] for name in left}
            known = {name: sum(self.goal[spot.path].size for spot in spots) for name, spots in ready.items()}
            name = max(left, key=known.__getitem__)
            self._apply(name, self._assigned(name, ready[name] or self.spots[name]))
            left.remove(name)

    def climb(self, sweeps: int) -> None:
        """Improves one permutation after another, to and fro, until none gains."""
        for number in range(sweeps):
            names = list(self.orders) if number % 2 else list(reversed(self.orders))
            gains = [self._improve(name) for name in names]
            if not any(gains):
                return

    def _improve(self, name: str) -> bool:
        order = self._assigned(name, self.spots[name])
        if np.array_equal(order, np.arange(len(order))):
            return False
        paths = {spot.path for spot in self.spots[name]}
        kept, before = {path: self.leaves[path] for path in paths}, self._products(paths)
        self._apply(name, order)
        size = sum(float(np.linalg.norm(self.goal[path]) * np.linalg.norm(kept[path])) for path in paths)
        if self._products(paths) > before + 1e-7 * size:
            return True
        self.orders[name] = self.orders[name][np.argsort(order)]  # no gain beyond rounding: as it was
        self.leaves |= kept
        return False

    def _assigned(self, name: str, spots: Iterable[_Spot]) -> np.ndarray:
        """Returns the order, on top of the present one, that brings the items nearest to their goals at some spots."""
        likeness = np.zeros((len(self.orders[name]),) * 2)
        for spot in spots:
            likeness += _items(self.goal[spot.path], spot) @ _items(self.leaves[spot.path], spot).T
        return scipy.optimize.linear_sum_assignment(np.nan_to_num(likeness), maximize=True)[1]

    def _apply(self, name: str, order: np.ndarray) -> None:
        self.orders[name] = self.orders[name][order]
        for spot in self.spots[name]:
            self.leaves[spot.path] = reordered(self.leaves[spot.path], spot.axis, spot.places, order)

    def _products(self, paths: Iterable[str]) -> float:
        return sum(float(np.sum(self.goal[path] * self.leaves[path], dtype=np.float64)) for path in paths)


def _items(value: np.ndarray, spot: _Spot) -> np.ndarray:
    """Returns the items of a leaf at a spot, as rows [n, ...]."""
    taken = np.take(value, spot.places.reshape(-1), axis=spot.axis)
    return np.moveaxis(taken, spot.axis, 0).reshape(len(spot.places), -1)
