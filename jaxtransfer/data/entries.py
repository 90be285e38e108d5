"""Entries of a data set: what is known of each column, and arrays that are to become columns, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtransfer.data.labels import class_labels, whole_label
from jaxtransfer.data.multi_hot import check_multi_hot, multi_hot
from jaxtransfer.errors import InputError, unknown

RESERVED = "mask"  # of evaluation batches: 1 for an example, 0 for padding
_AT_ONCE = 2**22  # values that are looked at in one go


@dataclass(frozen=True)
class Entry:
    """What is known of a column.

    Attributes:
      shape: of the value of one example.
      dtype: as batches hold it.
      class_names: of whole numbers that stand for classes: k is the class `class_names[k]`; where `multi_hot`, of the
        labels. None of other values.
      names: of the numbers along the last axis, such as the columns of a table that a matrix was made of.
      multi_hot: whether each example has any number of labels, [L] of 0 and 1 or probabilities: number l is of the
        label `class_names[l]`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    class_names: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    multi_hot: bool = False

    @property
    def classes(self) -> int | None:
        """Number of classes; None where the values are none."""
        return None if self.class_names is None else len(self.class_names)

    @property
    def is_label(self) -> bool:
        """Whether it is one class per example."""
        return self.class_names is not None and self.shape == ()

    @property
    def nbytes(self) -> int:
        """Bytes of one example's value."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __str__(self):
        """`image uint8 [8, 8, 1]` without the name: type, shape and classes."""
        shape = "" if self.is_label else f" {list(self.shape)}"
        kind = "labels of 0 and 1" if self.multi_hot else "classes"
        return f"{self.dtype}{shape}" + (f" of {self.classes} {kind}" if self.class_names is not None else "")


class NoColumnError(InputError, AttributeError):
    """A column that a data set doesn't have, asked for as an attribute: `hasattr(dataset, "image_shape")` is false."""


IMAGE_DTYPE, LABEL_DTYPE = np.dtype(np.uint8), np.dtype(np.int32)


def images_and_labels(class_names: Sequence[str] | None, image_shape: Sequence[int] | None) -> dict[str, Entry]:
    """Returns the entries of a data set of images with one label each; without those that are None."""
    found = {}
    if image_shape is not None:
        found["image"] = Entry(tuple(image_shape), IMAGE_DTYPE)
    if class_names is not None:
        found["label"] = Entry((), LABEL_DTYPE, tuple(class_names))
    return found


def known_entry(column: Any) -> Entry | None:
    """Returns what an array tells of itself; None of a column that is read from elsewhere."""
    return Entry(column.shape[1:], column.dtype) if isinstance(column, np.ndarray) else None


def column_of(name: str, values: Any, title: str, class_names: Any = ()) -> tuple[np.ndarray, Entry]:
    """Checks an array that is to be a column, and returns it as batches hold it.

    Numbers of 64 bits get the type that JAX would make of them, 32 bits unless x64 is enabled; whole numbers must fit.
    Texts, one per example, become classes in a column `label`, and in one with class names.

    Args:
      name: of the column.
      values: [N, ...].
      title: of the data set, for messages.
      class_names: one name per class, or per label where the values are `multi_hot`; None for the numbers up to the
        largest, or for texts their sorted set; () where none are told, which makes classes of the whole numbers and
        texts of a column `label` alone.

    Returns:
      The array, without a copy where it is one of that type, and its facts.

    Raises:
      InputError: for values that batches can't hold, numbers that are not finite, a class out of range.
    """
    what = f"{title}: column {name!r}"
    try:
        values = np.asarray(values)
    except ValueError as error:  # lists of several lengths
        raise InputError(f"{what} must be one array [N, ...]: {error}; pad its values to one shape") from None
    if not values.ndim:
        raise InputError(f"{what} must have one entry for each example [N, ...], got a single value {values!r:.60}")
    if class_names is not None and not isinstance(class_names, list | tuple | np.ndarray):
        raise InputError(f"{what}: class_names are a list of names, got {class_names!r:.60}")
    told = class_names is None or len(class_names) > 0
    if told or (name == "label" and values.ndim == 1 and values.dtype.kind in "iuUOb"):
        return _classes(name, values, what, class_names if told else None)
    if values.dtype.kind in "USOMmV":
        raise InputError(
            f"{what} is {_kind(values)}, and batches are of numbers. Classes: class_names={{{name!r}: None}} numbers "
            f"them. Sentences: jt.data.Vocabulary.of(texts) makes tokens. Else leave it out"
        )
    values = _narrowed(values, what)
    if values.dtype.kind in "fc" and (bad := _first_not_finite(values)) is not None:
        raise InputError(
            f"{what}: example {bad} has a value that is not finite, {values[bad].ravel()[~_finite(values[bad])][0]}; "
            f"fill it, with an indicator beside (jt.data.from_frame does), or leave the example out"
        )
    return values, Entry(values.shape[1:], values.dtype)


def type_in_batches(dtype: np.dtype) -> np.dtype:
    """Returns the type that JAX makes of one: of 64 bits 32, unless x64 is enabled."""
    if dtype.itemsize < 8 or dtype.kind not in "iufc":
        return dtype
    import jax

    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def arrays_of(
    columns: Mapping[str, Any], class_names: Mapping[str, Any], title: str
) -> tuple[dict[str, np.ndarray], dict[str, Entry]]:
    """Returns the checked arrays of a data set and their facts, by name; class names as for `column_of`.

    Raises:
      InputError: as `column_of`; for none, arrays of several lengths, a reserved name, class names of no column.
    """
    if not columns:
        raise InputError(f"{title}: expected one column or more, got none: from_columns(features=x, label=y)")
    for name in class_names:
        if name not in columns:
            raise unknown("column of class_names=", name, columns)
    arrays, entries = {}, {}
    for name, values in columns.items():
        if not isinstance(name, str) or not name or name == RESERVED:
            raise InputError(
                f"{title}: a column can't be called {name!r}, by which evaluation batches tell examples from padding; "
                f"weights of examples are called 'weight'"
                if name == RESERVED
                else f"{title}: columns are called by texts, got {name!r:.60}"
            )
        arrays[name], entries[name] = column_of(name, values, title, class_names.get(name, ()))
    first, *others = arrays
    for name in others:
        if len(arrays[name]) != len(arrays[first]):
            raise InputError(
                f"{title}: columns have one entry for each example; {first!r} has {len(arrays[first])}, {name!r} has "
                f"{len(arrays[name])}"
            )
    image = entries.get("image")
    if image is not None and len(image.shape) != 3:
        raise InputError(f"{title}: 'image' is [N, H, W, C], got {image}; call it otherwise, and name it by view=")
    return arrays, entries


def on_pixels(entries: Mapping[str, Entry]) -> frozenset[str]:
    """Returns the columns that have a value for each pixel of the column `image`."""
    size = entries["image"].shape[:2] if "image" in entries else None
    return frozenset(name for name, entry in entries.items() if name != "image" and entry.shape[:2] == size)


def check_class(name: str, value: Any, entry: Entry, title: str, index: int) -> Any:
    """Returns the value of an example in a column of classes.

    Raises:
      InputError: where it is none of them, or one label no whole number.
    """
    assert entry.class_names is not None
    if entry.multi_hot:
        check_multi_hot(np.asarray(value)[None], f"{title}: example {index}: column {name!r}")
        return value
    if not entry.shape:
        value = whole_label(value, title, index)
        ends = (value,)
    else:
        ends = (np.min(value), np.max(value)) if np.size(value) else ()
    for end in ends:
        if not 0 <= end < len(entry.class_names):
            raise out_of_range(index, end, entry.class_names, title, name)
    return value


def check_number(name: str, value: Any, entry: Entry, title: str, index: int) -> None:
    """Raises for numbers of an example that are not finite, or that the type of their column can't hold."""
    value = np.asarray(value)
    bad = np.empty(0)
    if entry.dtype.kind in "fc":
        bad = value[~np.isfinite(value)]
    elif entry.dtype.kind in "iu" and value.dtype != entry.dtype:
        most = np.iinfo(entry.dtype)
        bad = value[(value < most.min) | (value > most.max)]
    if bad.size:
        raise InputError(
            f"{title}: example {index} has {bad.ravel()[0]} in {name!r}, expected finite numbers of {entry.dtype}; "
            f"mend the data or leave the column out"
        )


def check_range(values: np.ndarray, class_names: Sequence[str], title: str, name: str = "label") -> None:
    """Raises for the first value [N, ...] that is no class; before any cast, which would bring it into the range."""
    count = len(class_names)
    for index in np.unique(np.nonzero((values < 0) | (values >= count))[0])[:1]:
        wrong = np.ravel(values[index])
        raise out_of_range(index, wrong[(wrong < 0) | (wrong >= count)][0], class_names, title, name)


def out_of_range(index, label, class_names: Sequence[str], title: str, name: str = "label") -> InputError:
    """Returns the error for an example's label that is no class."""
    what = "label" if name == "label" else f"{name!r}"
    return InputError(
        f"{title}: example {index} has {what} {label}, expected 0 to {len(class_names) - 1} "
        f"({len(class_names)} classes); mend the data or take a split with labels"
    )


def _classes(name: str, values: np.ndarray, what: str, class_names: Any) -> tuple[np.ndarray, Entry]:
    if class_names and (labels := multi_hot(values, class_names, what)) is not None:
        labels = _narrowed(labels, what)
        return labels, Entry(labels.shape[1:], labels.dtype, tuple(map(str, class_names)), multi_hot=True)
    if values.dtype == bool:
        class_names = class_names or ("False", "True")
        values = values.astype(np.int32)
    if values.ndim == 1:
        try:
            values, names = class_labels(values, len(values), class_names)
        except InputError as error:
            raise error if name == "label" else InputError(f"{what}: {error}") from None
        check_range(values, names, what.partition(": column")[0], name)
        return values.astype(LABEL_DTYPE), Entry((), LABEL_DTYPE, names)
    if values.dtype.kind not in "iu":
        raise InputError(f"{what} has class names, so its values must be whole numbers, got {_kind(values)}")
    names = class_names or tuple(map(str, range(int(values.max(initial=0)) + 1)))
    check_range(values, names, what.partition(": column")[0], name)
    values = _narrowed(values, what)
    return values, Entry(values.shape[1:], values.dtype, tuple(map(str, names)))


def _narrowed(values: np.ndarray, what: str) -> np.ndarray:
    """Returns numbers in the type that JAX computes with."""
    dtype = type_in_batches(values.dtype)
    check_fits(values, dtype, what)
    with np.errstate(over="ignore"):  # what is infinite then is told
        return values.astype(dtype, copy=False)


def check_fits(values: np.ndarray, dtype: np.dtype, what: str) -> None:
    """Raises for whole numbers that a narrower type can't hold, which a cast would bring round.

    Args:
      values: of any type; only whole numbers are looked at.
      dtype: the type that they are to have.
      what: whose values they are, for the message.

    Raises:
      InputError: names the number.
    """
    if values.dtype.kind in "iu" and dtype.kind in "iu" and dtype != values.dtype and values.size:
        most = np.iinfo(dtype)
        if values.min() < most.min or values.max() > most.max:
            raise InputError(
                f"{what} has {values.min() if values.min() < most.min else values.max()}, which {dtype} can't hold; "
                f"make smaller numbers or floats of them, or enable jax_enable_x64"
            )


def _finite(values: np.ndarray) -> np.ndarray:
    return np.isfinite(values.ravel())


def _first_not_finite(values: np.ndarray) -> int | None:
    rows = max(1, _AT_ONCE // max(1, values[:1].size))
    for start in range(0, len(values), rows):
        good = np.isfinite(values[start : start + rows]).reshape(len(values[start : start + rows]), -1).all(axis=1)
        if not good.all():
            return start + int(np.argmin(good))
    return None


def _kind(values: np.ndarray) -> str:
    if values.dtype.kind in "US" or (
        values.dtype == object and values.size and isinstance(values.flat[0], str | bytes)
    ):
        return "text"
    return str(values.dtype)
