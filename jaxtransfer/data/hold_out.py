"""Examples set aside for choosing, and whether two splits share examples."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from jaxtransfer.data.dataset import Dataset, check_dataset
from jaxtransfer.data.folder import parse_split
from jaxtransfer.errors import InputError

_ALL = "all"  # of tfds, and of folders without splits


def hold_out(dataset: Dataset, share: float, *, seed: int = 0, by: str = "label") -> tuple[Dataset, Dataset]:
    """Returns the data set without a share of each class, and that share: to train on, and to choose by.

    Of n examples of a class round(share · n) are held out, one at least and never all; a class of one example stays.
    The choice is a function of the seed and the labels. Where examples have any number of labels, a column [N, L] of 0
    and 1, about that share of the examples of each label is held out, of the rarest label first, and of those without
    any. (Sechidis, Tsoumakas, Vlahavas 2011, "On the Stratification of Multi-Label Data".)

    Args:
      dataset: with a class per example, or labels that hold together.
      share: in (0, 1).
      seed: of the choice.
      by: the column that holds the classes or labels.

    Raises:
      InputError: for a share out of range, a column of neither, and where nothing is left to hold out.
    """
    check_dataset(dataset, "hold_out")
    if not 0 < share < 1:
        raise InputError(f"the share to hold out is above 0 and below 1; got {share}")
    entry, labels = dataset.entry_of(by), dataset.labels if by == "label" else dataset.column(by)
    order = np.random.default_rng([seed, 0x5E7]).permutation(len(dataset))
    held = np.zeros(len(dataset), bool)
    if entry.is_label:
        for number in range(len(entry.class_names or ())):
            rows = order[labels[order] == number]
            held[rows[: _count(share, len(rows))]] = True
    elif labels.ndim == 2 and labels.size and np.isin(labels, (0, 1)).all():
        _hold_labels(held, labels.astype(bool), order, share)
    else:
        raise InputError(
            f"{dataset.title}: hold_out is by classes, or by labels [N, L] of 0 and 1, and {by!r} is {entry}; name a "
            f"column of such by by="
        )
    if not held.any():
        raise InputError(f"{dataset.title} has no class of two examples or more, of which one could be held out")
    chosen = dataset.select(np.flatnonzero(held))
    return dataset.select(np.flatnonzero(~held)), dataclasses.replace(chosen, split=f"{share:g} of {dataset.split}")


def _count(share: float, size: int) -> int:
    return max(0, min(max(1, math.floor(share * size + 0.5)), size - 1))


def _hold_labels(held: np.ndarray, labels: np.ndarray, order: np.ndarray, share: float) -> None:
    """Marks the examples of labels [N, L] that are held out, looked at in the given order."""
    wanted = np.array([_count(share, size) for size in labels.sum(axis=0)])
    left = np.ones(len(labels), bool)
    while (counts := labels[left].sum(axis=0)).any():
        label = int(np.argmin(np.where(counts > 0, counts, len(labels) + 1)))
        rows = order[(left & labels[:, label])[order]]
        held[rows[: max(0, wanted[label] - held[labels[:, label]].sum())]] = True
        left[rows] = False
    rows = order[left[order]]
    held[rows[: _count(share, len(rows))]] = True


def share_examples(one: str, other: str, size_of: Callable[[str], int]) -> bool:
    """Returns whether two splits have examples in common, by their names and slices: `train[:60%]` and `train[50%:]`.

    The split `all` has those of every other one; it is taken to share some with any part of them.

    Args:
      one: a split, several joined by a plus.
      other: likewise.
      size_of: the number of examples of a whole split, by its name; asked where both are slices of one.
    """
    for mine in one.split("+"):
        for theirs in other.split("+"):
            (name, *bounds), (same, *others) = parse_split(mine.strip()), parse_split(theirs.strip())
            if name != same:
                if _ALL in (name, same):
                    return True
                continue
            if not any((*bounds, *others)):
                return True
            size = size_of(name)
            (first, last), (begin, end) = _places(bounds, size), _places(others, size)
            if max(first, begin) < min(last, end):
                return True
    return False


def _places(bounds: list[str | None], size: int) -> tuple[int, int]:
    """The first example of a slice, and the one after its last."""
    places = []
    for bound, usual in zip(bounds, (0, size), strict=True):
        if bound is None:
            places.append(usual)
            continue
        place = round(size * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
        places.append(min(max(place + size if place < 0 else place, 0), size))
    return places[0], places[1]
