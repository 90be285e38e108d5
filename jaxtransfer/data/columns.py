"""Columns: further values of each example, read by number."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Column(Protocol):
    """Values of all examples: a NumPy array [N, ...], or what reads them when they are asked for."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """The values [n, ...] of the examples `rows`, int64 [n]."""
        ...


@dataclass(frozen=True, eq=False)
class ColumnView:
    """The rows int64 [n] of a column, which stays unread."""

    column: Any
    rows: np.ndarray

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        return self.column[self.rows[rows]]


def as_column(values) -> Any:
    """Arrays and lists as a NumPy array; other objects are columns already."""
    return np.asarray(values) if isinstance(values, list | tuple) or hasattr(values, "__array__") else values


def selected(column, rows: np.ndarray):
    """The rows of a column: of an array at once, of another column when they are read."""
    if isinstance(column, np.ndarray):
        return column[rows]
    return ColumnView(column.column, column.rows[rows]) if isinstance(column, ColumnView) else ColumnView(column, rows)
