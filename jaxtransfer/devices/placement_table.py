"""Who lives where: a table of a tree's leaves, how each is split, and what a device holds of it."""

import math
from typing import Any

import numpy as np

from jaxtransfer import tree


def placement_table(values: Any) -> str:
    """Returns a table of the leaves of a tree that is placed, a training state say, to print.

    A row per leaf: its path, its type and shape, by which axes of the mesh each dimension is split (`-`: not), the
    bytes that a device holds of it and those of the whole. The last row adds them up.

    Args:
      values: arrays, or `jax.ShapeDtypeStruct`s with a sharding; others count as whole on one device.
    """
    return _lines(_rows(values))


def state_table(state: Any) -> str:
    """Returns `placement_table` of a training state's parameters, with a row for each of its other parts."""
    rows = _rows(state.params)
    for name, part in (("model state", state.state), ("state of the optimiser", state.opt_state)):
        if tree.leaves_by_path(part):
            rows.append((name, *_rows(part)[-1][1:]))
    return _lines(rows)


def _rows(values: Any) -> list[tuple[str, ...]]:
    rows = [("leaf", "type", "split", "per device", "whole")]
    held, whole, devices = 0, 0, 1
    for path, leaf in tree.leaves_by_path(values).items():
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        sharding = getattr(leaf, "sharding", None)
        part = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        devices = devices if sharding is None else max(devices, len(sharding.device_set))
        own, full = (math.prod(shape) * leaf.dtype.itemsize for shape in (part, leaf.shape))
        held, whole = held + own, whole + full
        rows.append((path, f"{leaf.dtype}{list(leaf.shape)}", _split(sharding, leaf.ndim), f"{own:,}", f"{full:,}"))
    rows.append((f"in all, {devices} device{'s' if devices > 1 else ''}", "", "", f"{held:,}", f"{whole:,}"))
    return rows


def _lines(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names = [f"{cell:<{width}}" for cell, width in zip(row[:3], widths[:3], strict=True)]
        lines.append(
            "  ".join([*names, *(f"{cell:>{width}}" for cell, width in zip(row[3:], widths[3:], strict=True))])
        )
    return "\n".join(lines)


def _split(sharding: Any, dimensions: int) -> str:
    spec = getattr(sharding, "spec", None)
    if spec is None or not any(spec):
        return "whole" if sharding is None or sharding.is_fully_replicated else "in parts"
    entries = [*spec, *[None] * (dimensions - len(spec))]
    return ", ".join("-" if not one else one if isinstance(one, str) else " x ".join(one) for one in entries)
