"""Columns of a table as NumPy arrays: numbers with their gaps, categories by name, texts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError

MISSING = "(missing)"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Returns names in a row, those beyond `most` counted: "a, b, c and 4 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_number(series: Any) -> bool:
    """Whether a column of a pandas frame holds numbers or truth values."""
    return series.dtype.kind in "iufb"


def is_whole(series: Any) -> bool:
    """Whether it holds whole numbers or truth values; pandas makes floats of whole numbers where some are missing."""
    if series.dtype.kind in "iub":
        return True
    known = series.dropna()
    return series.dtype.kind == "f" and 0 < len(known) < len(series) and bool((known % 1 == 0).all())


def numbers_of(series: Any, title: str) -> np.ndarray:
    """Returns a column's numbers, float64 [N], NaN where one is missing.

    Raises:
      InputError: for what are no numbers, or infinite ones.
    """
    import pandas

    numeric: Any = pandas.to_numeric
    try:
        values = numeric(series).to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise InputError(f"{title}: column {series.name!r} must be numbers: {error}") from None
    if np.isinf(values).any():
        raise InputError(
            f"{title}: column {series.name!r} has infinite numbers; mend the table, or leave it out: drop="
        )
    return values


def names_of(series: Any, title: str) -> np.ndarray:
    """Returns a column's values as texts [N], "(missing)" where one is missing; 3.0 and 3 are both "3".

    Raises:
      InputError: for points in time, and other things.
    """
    if series.dtype.kind in "mM":
        raise InputError(
            f"{title}: column {series.name!r} has points in time; make numbers of it (years, say), or leave it out: "
            f"drop=({series.name!r},)"
        )
    values = np.array([_name(value) for value in series.tolist()], object)
    values[series.isna().to_numpy(bool)] = MISSING
    return values


def texts_of(series: Any) -> list[str]:
    """Returns a column's texts, "" where one is missing."""
    missing = series.isna().to_numpy(bool)
    return ["" if gone else str(value) for value, gone in zip(series.tolist(), missing, strict=True)]


def in_order(name: str) -> tuple[float, str]:
    """The key by which names are sorted: those that are numbers in their order, then others."""
    try:
        number = float(name)
    except ValueError:
        return float("inf"), name
    return (float("inf") if math.isnan(number) else number), name  # what compares with nothing has no place


def _name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
