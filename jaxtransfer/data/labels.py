"""Whole numbers from users: labels of classes and numbers of examples, checked before they are cast."""

import operator
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError

_UNNAMED = 1_000_000  # labels above need class names: a name for each number below would fill the memory


def class_labels(labels, size: int, class_names) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns integer labels [N], not yet checked against the classes, and the class names.

    Args:
      labels: integers or class names, N of them.
      size: N, the number of images.
      class_names: one name per class; None for the numbers up to the largest label, or for names their sorted set.

    Raises:
      InputError: for labels of another shape or type, a name that is no class, or a label too large to number classes
        up to it.
    """
    labels = np.asarray(labels)
    names = None if class_names is None else tuple(map(str, class_names))  # numbers too are names then
    if labels.shape == (size,) and size and (labels.dtype.kind == "U" or _texts(labels)):
        return _by_name(labels.tolist(), names)
    if labels.shape == (0,) and size == 0:
        return labels.astype(np.int32), names or ()
    if labels.shape != (size,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"labels must be integers [{size}], one per image, or class names; got {labels.dtype} {list(labels.shape)}"
            f"{_remedy(labels)}"
        )
    if names is None:
        if (largest := int(labels.max())) >= _UNNAMED:
            raise InputError(
                f"example {labels.argmax()} has label {largest}: too many classes to number up to it; pass "
                "class_names, or number the labels anew by np.unique(labels, return_inverse=True)[1]"
            )
        names = tuple(map(str, range(largest + 1)))
    return labels, names


def whole_label(label: Any, title: str, index: int) -> int:
    """Returns the label of one example, which must be a whole number.

    Raises:
      InputError: names the example.
    """
    try:
        return operator.index(label)
    except TypeError:
        raise InputError(
            f"{title}: example {index} has the label {label!r}, expected one whole number, the number of its class"
        ) from None


def example_numbers(indices: Any, what: str) -> np.ndarray:
    """Returns numbers of examples as int64 of their shape, which must be whole; [] is none of them.

    Raises:
      InputError: for fractions, truth values, or anything else that a cast would make numbers of.
    """
    numbers = np.asarray(indices)
    if not numbers.size:
        return numbers.astype(np.int64)
    if not np.issubdtype(numbers.dtype, np.integer):
        mask = "; of a mask np.flatnonzero(mask)" if numbers.dtype == bool else ""
        raise InputError(f"{what} takes whole numbers of examples, got {numbers.dtype} {numbers.flat[0]!r}{mask}")
    return numbers.astype(np.int64)


def _texts(labels: np.ndarray) -> bool:
    return labels.dtype == object and all(isinstance(label, str) for label in labels)


def _by_name(labels: list[str], names: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    names = tuple(sorted(set(labels))) if names is None else names
    number = {name: label for label, name in enumerate(names)}
    if len(number) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"class_names has {twice!r} more than once, so labels that are names can't be told apart")
    for index, label in enumerate(labels):
        if label not in number:
            raise InputError(f"example {index} has label {label!r}, which is none of the class_names {_listed(names)}")
    return np.array([number[label] for label in labels], np.int32), names


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:10])) + (f", ... ({len(names)})" if len(names) > 10 else "")


def _remedy(labels: np.ndarray) -> str:
    if labels.ndim == 2 and labels.shape[1] > 1:
        return "; of one-hot labels pass labels.argmax(1)"
    if labels.ndim == 2:
        return "; pass labels[:, 0]"
    if labels.dtype.kind == "f" and labels.ndim == 1:
        return "; round them, labels.astype(int), where they are whole numbers"
    return ""
