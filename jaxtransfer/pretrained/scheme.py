"""A scheme: which names a library gives to the layers of a family of networks, and how it lays out their values."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxtransfer.pretrained.layouts import KINDS, Layout, Read, Shapes, layer
from jaxtransfer.pretrained.preprocessing import Preprocessing


class Rule(NamedTuple):
    """A row of a table.

    Attributes:
      pattern: a regular expression that matches all of a layer's name, without the `.weight`, `.bias` or
        `.running_...` behind it; where a tensor's name ends otherwise, all of the tensor's.
      path: that of our layer; `\\1` is what the first group matched, `{\\1}` one more.
      how: what becomes of the values: a `Layout`, or a function like its `read`, by which weights are read alone.
    """

    pattern: str
    path: str
    how: Layout | Read = layer


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Names of one library for one family of networks.

    Attributes:
      name: for reports and errors.
      rules: the table, of which the first row that matches counts; or a function of the model's shapes, by path, that
        makes it, where names depend on the depth.
      left_out: names of tensors that no network of ours has a place for, and why, by pattern; or a function of the
        model's shapes and of all names that makes it.
      preprocessing: what the library's published weights expect, where all of them expect the same.
      sized: whether they do so but for the size, which is that of the network's row of the zoo.
      libraries: whose names these are, for exports: "torchvision", "timm".
      networks: constructors of ours whose networks are of the family: no other network is exported by these names,
        though it may have layers of the same names; empty for any.
      unsaid: what the names leave open that changes what a network gives, by constructor of ours; reports tell it where
        nothing beside the weights says it.
    """

    name: str
    rules: Sequence[Rule] | Callable[[Shapes], Sequence[Rule]]
    left_out: Mapping[str, str] | Callable[[Shapes, Collection[str]], Mapping[str, str]] = dataclasses.field(
        default_factory=dict
    )
    preprocessing: Preprocessing | None = None
    sized: bool = False
    libraries: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    unsaid: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def table(self, shapes: Shapes) -> Sequence[Rule]:
        """Returns the rules for a model with leaves of these shapes."""
        return self.rules(shapes) if callable(self.rules) else self.rules

    def leaves_out(self, shapes: Shapes, names: Collection[str]) -> Mapping[str, str]:
        """Returns the patterns of names that have no place in a model with leaves of these shapes, and why."""
        return self.left_out(shapes, names) if callable(self.left_out) else self.left_out


def translate(name: str, value: np.ndarray, rules: Sequence[Rule], shapes: Shapes) -> dict[str, np.ndarray] | None:
    """Returns the leaves of ours, by path, that a tensor gives; None where no rule matches its name.

    Args:
      name: of the tensor.
      value: of the tensor.
      rules: the table.
      shapes: of the model's leaves, by path.
    """
    start, _, kind = name.rpartition(".")
    whole = name if kind not in KINDS else start
    for rule in rules:
        if match := re.fullmatch(rule.pattern, whole):
            path = re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), match.expand(rule.path))
            return rule.how(kind, path, value, shapes)
    return None
