"""How a library lays out the values of a layer, and how we do: each layout there and back."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
Leaves = Mapping[str, np.ndarray]
Read = Callable[[str, str, np.ndarray, Shapes], dict[str, np.ndarray]]
Write = Callable[[str, Leaves], dict[str, np.ndarray]]

KINDS = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
"""What the tensors of a layer of PyTorch are called, and what the leaves of a norm are here."""

_MAPS = 512  # channels of the last map of a VGG net


class Layout(NamedTuple):
    """A layout of values, there and back: writing what was read gives the same tensors, bit by bit.

    Attributes:
      read: `read(kind, path, value, shapes)` gives leaves of ours by path: `kind` is what a tensor's name ends in,
        `path` that of our layer, `shapes` are those of the model's leaves.
      write: `write(path, leaves)` gives the tensors of our layer at `path` by kind, "" where a tensor's name has none;
        empty where `leaves` has no such layer.
    """

    read: Read
    write: Write

    def __call__(self, kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
        """Returns the leaves of ours that a tensor gives: `read`."""
        return self.read(kind, path, value, shapes)


def _read_layer(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    if kind == "weight" and value.ndim > 1:
        return {f"params/{path}/kernel": value.transpose(*range(2, value.ndim), 1, 0)}
    ours = KINDS.get(kind, kind)
    return {f"{'batch_stats' if ours in ('mean', 'var') else 'params'}/{path}/{ours}": value}


def _write_layer(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    out = {}
    if (kernel := leaves.get(f"params/{path}/kernel")) is not None:
        out["weight"] = kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
    for kind, ours in KINDS.items():
        leaf = leaves.get(f"{'batch_stats' if ours in ('mean', 'var') else 'params'}/{path}/{ours}")
        if leaf is not None:
            out[kind] = leaf
    return out


def _read_heads(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    leaves = _read_layer(kind, path, value, shapes)
    return {full: _reshaped(found, shapes.get(full)) for full, found in leaves.items()}


def _write_heads(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    flat = {}
    if (kernel := leaves.get(f"params/{path}/kernel")) is not None:
        back = (-1, kernel.shape[-1]) if path.endswith("/out") else (kernel.shape[0], -1)
        flat[f"params/{path}/kernel"] = kernel.reshape(back)
    if (bias := leaves.get(f"params/{path}/bias")) is not None:
        flat[f"params/{path}/bias"] = bias.reshape(-1)
    return _write_layer(path, flat)


def _read_fused(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    if value.shape[0] % 3:
        return {f"params/{path}/qkv/{kind}": value}  # not what it seems: left over, by name
    kind = "weight" if value.ndim > 1 else "bias"
    thirds = zip(_THIRDS, np.split(value, 3), strict=True)
    leaves = (_read_heads(kind, f"{path}/{name}", part, shapes) for name, part in thirds)
    return {full: found for part in leaves for full, found in part.items()}


def _write_fused(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    parts = [_write_heads(f"{path}/{name}", leaves) for name in _THIRDS]
    if not all(parts) or len({frozenset(part) for part in parts}) > 1:
        return {}
    return {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}


def _read_direct(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    return {f"params/{path}": _reshaped(value, shapes.get(f"params/{path}"))}


def _write_direct(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    leaf = leaves.get(f"params/{path}")
    return {} if leaf is None else {"": leaf}


def _write_bare_weight(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    leaf = leaves.get(f"params/{path}")
    return {} if leaf is None else {"weight": leaf}


def _read_as_is(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    return {path: value}


def _write_as_is(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    return {"": leaves[path]} if path in leaves else {}


def _read_table(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    return {f"params/{path}/embedding": value}


def _write_table(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    leaf = leaves.get(f"params/{path}/embedding")
    return {} if leaf is None else {"weight": leaf}


def _read_on_map(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    if value.ndim == 2 and kind == "weight":
        side = _side(value.shape[1])
        if side is None:
            return _read_layer(kind, path, value, shapes)
        value = value.reshape(value.shape[0], _MAPS, side, side)
    if value.ndim == 4:
        value = value.transpose(0, 2, 3, 1).reshape(value.shape[0], -1)
    return _read_layer(kind, path, value, shapes)


def _write_conv_on_map(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    out = _write_layer(path, leaves)
    side = _side(out["weight"].shape[1]) if "weight" in out else None
    if side is not None:
        weight = out["weight"]
        out["weight"] = weight.reshape(weight.shape[0], side, side, _MAPS).transpose(0, 3, 1, 2)
    return out


def _write_dense_on_map(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    out = _write_conv_on_map(path, leaves)
    return {kind: value.reshape(value.shape[0], -1) if value.ndim == 4 else value for kind, value in out.items()}


def _read_one_by_one(kind: str, path: str, value: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    flat = value.ndim == 4 and value.shape[2:] == (1, 1)
    return _read_layer(kind, path, value[:, :, 0, 0] if flat else value, shapes)


def _write_one_by_one(path: str, leaves: Leaves) -> dict[str, np.ndarray]:
    out = _write_layer(path, leaves)
    return {kind: value[:, :, None, None] if kind == "weight" else value for kind, value in out.items()}


def _side(inputs: int) -> int | None:
    side = round((inputs / _MAPS) ** 0.5)
    return side if side * side * _MAPS == inputs else None


def _reshaped(value: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    fits = shape is not None and len(shape) != value.ndim and np.prod(shape) == value.size
    return value.reshape(shape) if fits else value


_THIRDS = ("query", "key", "value")

layer = Layout(_read_layer, _write_layer)
"""A layer of PyTorch: kernels [O, I, H, W] become [H, W, I, O], weights [O, I] [I, O], norms' their names here."""

heads = Layout(_read_heads, _write_heads)
"""A projection of attention: as `layer`, its width split into heads [H, D / H] as the model's is."""

fused = Layout(_read_fused, _write_fused)
"""Query, key and value in one tensor [3 · D, ...], one after the other."""

direct = Layout(_read_direct, _write_direct)
"""A leaf as it is, but for axes that the model splits."""

bare_weight = Layout(_read_direct, _write_bare_weight)
"""The only tensor of a layer of theirs, a leaf without a layer here: a table of positions."""

as_is = Layout(_read_as_is, _write_as_is)
"""A leaf of ours, under its own path."""

embedding = Layout(_read_table, _write_table)
"""A table of vectors, one a row."""

dense_on_map = Layout(_read_on_map, _write_dense_on_map)
"""A linear layer on a flat map, theirs flat as [C, H, W], ours as [H, W, C]."""

conv_on_map = Layout(_read_on_map, _write_conv_on_map)
"""A convolution over all of a map [O, C, H, W] that is a linear layer on the flat map here."""

one_by_one = Layout(_read_one_by_one, _write_one_by_one)
"""A 1×1 convolution that is a linear layer here."""
