"""Which scheme the names of some weights are of: the one by which most of them find a leaf of the model."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.pretrained.layouts import Shapes
from jaxtransfer.pretrained.scheme import Scheme, translate


class Match(NamedTuple):
    """Weights read by a scheme.

    Attributes:
      scheme: the scheme.
      prefix: what was taken off the names in front, "" or something that ends in a dot.
      values: by path of ours.
      names: of the tensor that each of them is from, by path.
      left: names of tensors that the scheme leaves out, and why.
      unknown: names of tensors that no rule of it matches.
    """

    scheme: Scheme
    prefix: str
    values: dict[str, np.ndarray]
    names: dict[str, str]
    left: dict[str, str]
    unknown: tuple[str, ...]

    def score(self, shapes: Shapes) -> int:
        """Returns how well it fits: leaves found, less tensors that found none."""
        found = sum(path in shapes for path in self.values)
        return 2 * found - len(self.values) - len(self.unknown)


def best_match(tensors: Mapping[str, np.ndarray], shapes: Shapes, schemes: Iterable[Scheme]) -> Match:
    """Returns the weights as the scheme reads them that fits best, with the prefix that fits best.

    Args:
      tensors: by name.
      shapes: of the model's leaves, by path.
      schemes: the ones to try; of equals the first counts.
    """
    tried = [match(tensors, shapes, scheme, prefix) for prefix in _prefixes(tensors) for scheme in schemes]
    return max(tried, key=lambda one: one.score(shapes))


def match(tensors: Mapping[str, np.ndarray], shapes: Shapes, scheme: Scheme, prefix: str = "") -> Match:
    """Returns the weights as a scheme reads them.

    Args:
      tensors: by name.
      shapes: of the model's leaves, by path.
      scheme: the table.
      prefix: taken off the names that begin with it.

    Raises:
      InputError: where two tensors are one leaf.
    """
    rules = scheme.table(shapes)
    found = Match(scheme, prefix, {}, {}, {}, ())
    without = scheme.leaves_out(shapes, [name.removeprefix(prefix) for name in tensors])
    unknown = []
    for name, value in tensors.items():
        short = name.removeprefix(prefix)
        reason = next((why for pattern, why in without.items() if re.fullmatch(pattern, short)), None)
        if reason is not None:
            found.left[name] = reason
            continue
        leaves = translate(short, value, rules, shapes)
        if leaves is None or any(path in found.values for path in leaves):
            unknown.append(name)  # of two with one meaning, as with and without the prefix, the second is left over
            continue
        found.values.update(leaves)
        found.names.update(dict.fromkeys(leaves, name))
    return found._replace(unknown=tuple(unknown))


def check_kinds(found: Match, dtypes: Mapping[str, np.dtype]) -> None:
    """Raises where a tensor is no floating number and the leaf is: it is quantised, and its scale is elsewhere.

    Args:
      found: the weights.
      dtypes: of the model's leaves, by path.
    """
    for path, value in found.values.items():
        floating = value.dtype.kind == "f" or value.dtype.name.startswith(("bfloat", "float8"))
        if path in dtypes and np.issubdtype(dtypes[path], np.floating) and not floating:
            name = found.names[path]
            raise InputError(f"the tensor {name!r} is of type {value.dtype}, quantised say; pass weights that are not")


def _prefixes(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns "" and what a third of the names, or more, begin with, three words at most: `backbone.`, `encoder_q.`"""
    counts: collections.Counter[str] = collections.Counter()
    for name in tensors:
        words = name.split(".")
        counts.update(".".join(words[:number]) + "." for number in range(1, min(4, len(words))))
    return ["", *(prefix for prefix, count in counts.items() if 3 * count >= len(tensors))]
