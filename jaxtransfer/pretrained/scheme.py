"""A scheme: which names a library gives to the layers of a family of networks, and how it lays out their values."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxtransfer.pretrained.preprocessing import Preprocessing

Shapes = Mapping[str, tuple[int, ...]]
How = Callable[[str, str, np.ndarray, Shapes], dict[str, np.ndarray]]
"""`how(kind, path, value, shapes)` gives leaves of ours by path: `kind` is what a tensor's name ends in, `path` that of
our layer, `shapes` are those of the model's leaves."""

KINDS = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def layer(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """A layer of PyTorch: kernels [O, I, H, W] become [H, W, I, O], weights [O, I] [I, O], norms' their names here."""
    if kind == "weight" and value.ndim > 1:
        return {f"params/{path}/kernel": value.transpose(*range(2, value.ndim), 1, 0)}
    ours = KINDS.get(kind, kind)
    return {f"{'batch_stats' if ours in ('mean', 'var') else 'params'}/{path}/{ours}": value}


def heads(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """A projection of attention: as `layer`, its width split into heads [H, D / H] as the model's is."""
    return {full: _reshaped(found, shapes.get(full)) for full, found in layer(kind, path, value, shapes).items()}


def fused(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """Query, key and value in one tensor [3 · D, ...], one after the other."""
    if value.shape[0] % 3:
        return {f"params/{path}/qkv/{kind}": value}  # not what it seems: left over, by name
    kind = "weight" if value.ndim > 1 else "bias"
    thirds = zip(("query", "key", "value"), np.split(value, 3), strict=True)
    return {full: found for name, part in thirds for full, found in heads(kind, f"{path}/{name}", part, shapes).items()}


def direct(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """A leaf as it is, but for axes that the model splits."""
    return {f"params/{path}": _reshaped(value, shapes.get(f"params/{path}"))}


def as_is(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """A leaf of ours, under its own path."""
    return {path: value}


def dense_on_map(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """A linear layer on a flat map, PyTorch's flat as [C, H, W], ours as [H, W, C]; or a convolution over all of it."""
    if value.ndim == 2 and kind == "weight":
        channels = 512
        side = round((value.shape[1] / channels) ** 0.5)
        if side * side * channels != value.shape[1]:
            return layer(kind, path, value, shapes)
        value = value.reshape(value.shape[0], channels, side, side)
    if value.ndim == 4:
        value = value.transpose(0, 2, 3, 1).reshape(value.shape[0], -1)
    return layer(kind, path, value, shapes)


def one_by_one(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """A 1×1 convolution that is a linear layer here."""
    return layer(kind, path, value[:, :, 0, 0] if value.ndim == 4 and value.shape[2:] == (1, 1) else value, shapes)


class Rule(NamedTuple):
    """A row of a table.

    Attributes:
      pattern: a regular expression that matches all of a layer's name, without the `.weight`, `.bias` or
        `.running_...` behind it; where a tensor's name ends otherwise, all of the tensor's.
      path: that of our layer; `\\1` is what the first group matched, `{\\1}` one more.
      how: what becomes of the values.
    """

    pattern: str
    path: str
    how: How = layer


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Names of one library for one family of networks.

    Attributes:
      name: for reports and errors.
      rules: the table, of which the first row that matches counts; or a function of the model's shapes, by path, that
        makes it, where names depend on the depth.
      left_out: names of tensors that no network of ours has a place for, and why, by pattern.
      preprocessing: what the library's published weights expect, where all of them expect the same.
    """

    name: str
    rules: Sequence[Rule] | Callable[[Shapes], Sequence[Rule]]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preprocessing: Preprocessing | None = None

    def table(self, shapes: Shapes) -> Sequence[Rule]:
        """Returns the rules for a model with leaves of these shapes."""
        return self.rules(shapes) if callable(self.rules) else self.rules


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


def _reshaped(value: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    fits = shape is not None and np.prod(shape) == value.size
    return value.reshape(shape) if fits and shape != value.shape else value
