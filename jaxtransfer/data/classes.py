"""Which class of one naming is which class of another: names beat numbers."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtransfer.errors import InputError


class Places(NamedTuple):
    """Where the classes of a data set stand among others.

    Attributes:
      places: int64 [n], for each class its number among the others; -1 where they don't have it.
      known: how many the others are.
      by_number: whether numbers decided, because one side has no names.
    """

    places: np.ndarray
    known: int
    by_number: bool = False

    @property
    def same(self) -> bool:
        """Whether both count the same classes in the same order."""
        return bool(np.array_equal(self.places, np.arange(self.known)))


def match_classes(names: Sequence[str], known: Sequence[str], *, of: str, whose: str) -> Places:
    """Finds classes among others by their names, whatever the order of either.

    Names that are plain numbers on both sides are compared as numbers, so that "01" is "1". A side whose names are
    just 0 to n - 1 has none: beside a side with names its numbers decide, if there are as many.

    Args:
      names: of the classes, n of them.
      known: of the others.
      of: what the classes are of, for messages.
      whose: what the others are of.

    Returns:
      The `Places`.

    Raises:
      InputError: where nothing tells which class is which: no names on one side and another number of classes on the
        other, or a name that stands for two of the others.
    """
    if list(names) == list(known):
        return Places(np.arange(len(names)), len(known))
    ours, theirs = _numbers(names), _numbers(known)
    both = (ours, theirs) if ours and theirs else (names, known)
    keys, others = map(list[int | str], both)
    shared = set(keys) & set(others)
    if not shared and bool(ours) != bool(theirs) and _plain(ours or theirs):
        if len(names) != len(known):
            raise InputError(
                f"nothing tells which class is which: {of if ours else whose} has numbers for names, and {of} has "
                f"{len(names)} classes, {whose} {len(known)}; name the classes alike"
            )
        order = np.argsort(theirs) if theirs else np.array(ours)
        return Places(order.astype(np.int64), len(known), by_number=True)
    twice = [name for name in sorted(shared, key=str) if others.count(name) > 1 or keys.count(name) > 1]
    if twice:
        raise InputError(f"nothing tells which class is which: two of {whose} or of {of} are called {str(twice[0])!r}")
    place = {name: number for number, name in enumerate(others)}
    return Places(np.array([place.get(name, -1) for name in keys], np.int64), len(known))


def not_among(name: str, known: Sequence[str], *, of: str, whose: str) -> InputError:
    """Returns the error for a class of `of` that is none of the `known` ones, which are `whose`."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return InputError(f"{whose} has no class {name!r}{hint}, which {of} has")


def _numbers(names: Sequence[str]) -> list[int]:
    """Returns the numbers that all names are, or none."""
    numbers = [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 19]
    return numbers if len(set(numbers)) == len(names) else []


def _plain(numbers: list[int]) -> bool:
    """Whether they are 0 to n - 1, which is what classes without names are called."""
    return sorted(numbers) == list(range(len(numbers)))
