"""What scores are computed of: rows of numbers in double precision, checked."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax

from jaxtransfer.errors import InputError


def rows_of(values: ArrayLike, name: str) -> np.ndarray:
    """Returns numbers [N, D] as float64.

    Raises:
      InputError: for another shape, no rows, or values that are not finite.
    """
    rows = np.asarray(values)
    if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.number):
        raise InputError(f"{name}: expected numbers [N, D], of an example or more; got {rows.dtype} {list(rows.shape)}")
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise InputError(f"{name}: some of the numbers are not finite; has the training diverged?")
    return rows


def log_probabilities(logits: ArrayLike, name: str) -> np.ndarray:
    """Returns the log softmax [N, C] of logits of two classes or more."""
    rows = rows_of(logits, name)
    if rows.shape[1] < 2:
        raise InputError(f"{name}: expected the logits of two classes or more, [N, C]; got {list(rows.shape)}")
    return log_softmax(rows, axis=1)


def labels_of(labels: ArrayLike, rows: int, classes: int, name: str) -> np.ndarray:
    """Returns class numbers [N], one for each row.

    Raises:
      InputError: for another shape, or what is no class.
    """
    found: Any = np.asarray(labels)
    if found.shape != (rows,) or not np.issubdtype(found.dtype, np.integer):
        raise InputError(f"{name}: expected a class number for each of {rows} rows; got {found.dtype} {found.shape}")
    if found.min() < 0 or found.max() >= classes:
        raise InputError(f"{name}: expected class numbers in [0, {classes}); got {found.min()} to {found.max()}")
    return found


def entropies(log_p: np.ndarray) -> np.ndarray:
    """Returns the entropy [N] of each row of log probabilities [N, C], in nats."""
    return -np.sum(np.exp(log_p) * log_p, axis=1)


def alike(source: np.ndarray, target: np.ndarray) -> None:
    """Raises where two sets of features differ in their dimensions."""
    if source.shape[1] != target.shape[1]:
        raise InputError(
            f"expected features of the same dimensions in both domains; got {source.shape[1]} of the source and "
            f"{target.shape[1]} of the target"
        )
