"""Columns where each example has any number of labels: 0 or 1 for each of them, or probabilities."""

from collections.abc import Sequence

import numpy as np

from jaxtransfer.errors import InputError


def multi_hot(values: np.ndarray, class_names: Sequence[str], what: str) -> np.ndarray | None:
    """Returns the labels [N, L] of a column whose class names name labels; None where its values are classes.

    They name labels where the values are [N, L], of 0 and 1, with L names; fractions [N, L] can be nothing else.

    Args:
      values: of the column, [N, ...].
      class_names: its names, one or more.
      what: the column, for messages.

    Raises:
      InputError: for fractions with another number of names or outside of [0, 1], and for a name that occurs twice.
    """
    if values.ndim != 2 or values.dtype.kind not in "iubf":
        return None
    names, width = [str(name) for name in class_names], values.shape[1]
    if len(names) != width:
        if values.dtype.kind == "f":
            raise InputError(
                f"{what} has fractions for {width} labels, which hold together, and {len(names)} class names; give one "
                f"name for each label, or whole numbers, labels.astype(int), where they are classes"
            )
        return None
    if values.dtype.kind == "f":
        check_multi_hot(values, what)
    elif values.dtype != bool and values.size and not (values.min() >= 0 and values.max() <= 1):
        return None
    if len(set(names)) < width:
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{what} names two of its labels {twice!r}; labels that hold together need names of their own")
    return values.astype(np.int32) if values.dtype == bool else values


def check_multi_hot(values: np.ndarray, what: str) -> None:
    """Raises for the first value [N, L] that is neither 0 nor 1 nor a probability."""
    good = (values >= 0) & (values <= 1)
    if not good.all():
        raise InputError(
            f"{what} has class names for each of its {values.shape[-1]} labels, so its values are 0 or 1, or "
            f"probabilities; got {values[~good][0]}. Leave the class names out of what are other numbers"
        )
