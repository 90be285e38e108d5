"""A data set as random access: one example by its number, all its columns."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from jaxtransfer.data.columns import Column
from jaxtransfer.data.derived import Derived
from jaxtransfer.data.entries import (
    Entry,
    NoColumnError,
    arrays_of,
    check_class,
    check_fits,
    check_number,
    check_range,
    images_and_labels,
    known_entry,
    on_pixels,
)
from jaxtransfer.data.labels import class_labels, example_numbers, whole_label
from jaxtransfer.data.multi_hot import check_multi_hot
from jaxtransfer.data.resized import Resized
from jaxtransfer.data.sources import ArraySource, Source, read_column
from jaxtransfer.data.table_columns import listed
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.resizing import Resizing


@dataclass(frozen=True, eq=False, init=False)
class Dataset(Derived, Resized):
    """A random-access source of examples: columns of equal length, `image` and `label` two names among them.

    `dataset[i]` is a dict of the example's entry of each column, `{"image": uint8 [H, W, C], "label": int}` of labelled
    images. `jt.data.load` reads one, `from_columns` and `from_arrays` make one of arrays.

    Attributes:
      name: the name it was loaded by.
      split: its split.
      source: where examples come from.
      rows: int64 [N], the examples of `source` that belong to it; None for all of them.
      resize: whether images of other sizes are brought to `image_shape`; otherwise they are an error.
      columns: further values of each example by name, numbered as the data set is; see `with_columns`.
      of_image: the columns that are functions of the unaugmented image, or lie on its pixels.
      entries: what is known of each column by its name: shape, dtype, class names; see `jt.data.Entry`.
      recipe: how they were made of the rows of a table, by which others are made alike (`from_frame(like=)`); None of
        other data.
      resizing: how images are brought to `image_shape` where `resize`, and how they were where they are decoded; None
        stretches those of another shape.
    """

    name: str
    split: str
    source: Source
    rows: np.ndarray | None
    resize: bool
    columns: Mapping[str, Column]
    of_image: frozenset[str]
    entries: Mapping[str, Entry]
    recipe: Any
    resizing: Resizing | None

    def __init__(
        self,
        name: str,
        split: str,
        class_names: Sequence[str] | None = None,
        image_shape: Sequence[int] | None = None,
        source: Any = None,
        rows: np.ndarray | None = None,
        resize: bool = False,
        columns: Mapping[str, Column] | None = None,
        of_image: Iterable[str] = (),
        entries: Mapping[str, Entry] | None = None,
        recipe: Any = None,
        resizing: Resizing | None = None,
    ):
        if source is None:
            raise InputError("a data set needs a source; jt.data.load, Dataset.from_columns and from_arrays make one")
        known = {**(entries or {}), **images_and_labels(class_names, image_shape)}
        for column, values in (columns or {}).items():
            if column not in known and (told := known_entry(values)):
                known[column] = told
        values = (name, split, source, rows, resize, dict(columns or {}), frozenset(of_image), known)
        values = (*values, recipe, resizing)
        for field, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_arrays(cls, images, labels, *, class_names=None, name="arrays", split="all") -> "Dataset":
        """Makes a data set of labelled images in memory; `from_columns` takes any other data.

        Args:
          images: uint8 [N, H, W, C].
          labels: integers [N], or the names of the classes.
          class_names: one name per class; by default the numbers up to the largest label, or the names, sorted.
          name: the name that messages show.
          split: the split that messages show.

        Returns:
          The data set; it holds the images without a copy.

        Raises:
          InputError: for another dtype or shape, or a label outside of the classes.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise InputError(f"images must be uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
        labels, class_names = class_labels(labels, len(images), class_names)
        arrays = {"image": images, "label": labels}
        return cls.from_columns(arrays, class_names={"label": class_names}, name=name, split=split)

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, Any] | None = None,
        /,
        *,
        class_names: Mapping[str, Sequence[str] | None] | None = None,
        of_image: Iterable[str] | None = None,
        name: str = "columns",
        split: str = "all",
        **more: Any,
    ) -> "Dataset":
        """Makes a data set of arrays in memory, of any names: numbers, tokens, masks, several labels, images or none.

            data = jt.data.Dataset.from_columns(features=x, label=y)  # float [N, D] and integers [N]
            jt.fit(jt.classification(model, view="features"), optimizer, jt.data.pipeline(data, 64), steps=1000)

        Batches hold each column under its name, [B, ...]. Objectives look for `image` and `label` unless told otherwise
        (`view=`, `label=`), and weigh examples by a column `weight`; `index` numbers them. `mask` is the name of
        evaluation batches for what is padding. Numbers of 64 bits become those of 32 bits, unless JAX has x64 enabled.

        Args:
          columns: arrays [N, ...] by name; or as keywords.
          class_names: by column, one name per class: whole numbers, of any shape, are then its classes, and texts [N]
            are numbered. None numbers the classes up to the largest, or takes the texts, sorted. A column `label` of
            whole numbers, booleans or texts [N] is such a one anyway. Of L labels that hold together, [N, L] of 0 and
            1 or of probabilities, give L names, one per label; whole numbers [N, L] with another number of names, or
            above 1, are L classes.
          of_image: columns that hold for the images as they are, which a pipeline then refuses to augment. By default
            those with a value per pixel: of the height and width of `image`.
          name: the name that messages show.
          split: the split that messages show.

        Returns:
          The data set; it holds arrays without a copy, where their type stays.

        Raises:
          InputError: for columns of several lengths, texts that are no classes, numbers that are not finite, a class
            out of range.
        """
        arrays, entries = arrays_of({**(columns or {}), **more}, class_names or {}, f"{name} ({split})")
        if of_image is None:
            of_image = on_pixels(entries)
        for column in of_image:
            if column not in entries:
                raise unknown("column of of_image=", column, entries)
        return cls(name, split, source=ArraySource(arrays), of_image=of_image, entries=entries)

    @property
    def tokenizer(self) -> Any:
        """What made the tokens of a table's texts, a `Tokenizer` or a `Vocabulary`; None of other data."""
        return getattr(self.recipe, "vocabulary", None)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class: `label` k is the class `class_names[k]`; of another column, `entries[name].class_names`.

        Empty where the labels are no classes, or there are none.
        """
        entry = self.entries.get("label")
        return (entry.class_names or ()) if entry is not None else ()

    @property
    def classes(self) -> int:
        """Number of classes of `label`; of another column, `entries[name].classes`."""
        if (count := self.entry_of("label").classes) is None:
            raise NoColumnError(f"{self.title}: its labels are numbers ({self.entry_of('label')}), not classes")
        return count

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every `image`."""
        return self.entry_of("image").shape  # pyright: ignore[reportReturnType]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]; read once. Where `label` is no class per example, its values [N, ...].

        Raises:
          InputError: names the first example whose label is outside of [0, classes).
        """
        return self.column("label")

    def column(self, name: str) -> np.ndarray:
        """All values of a column, [N, ...], in the order of the examples; images are decoded only where they are asked.

        Args:
          name: of the column.

        Raises:
          InputError: for an unknown name, and names the first example whose class is out of range.
        """
        if name in self.columns:
            return np.asarray(self.columns[name][np.arange(len(self))])
        entry = self.entry_of(name)
        if (
            entry.shape and not self.in_memory
        ):  # images, and what lies on their pixels, are decoded and brought to shape
            return self.sourced(np.arange(len(self)))[name]
        values = read_column(self.source, name)
        values = values if self.rows is None else values[self.rows]
        if entry.is_label and values.size and not (values.ndim == 1 and np.issubdtype(values.dtype, np.integer)):
            whole_label(values.tolist()[0], self.title, 0)  # raises
        if entry.multi_hot:
            check_multi_hot(values, f"{self.title}: column {name!r}")
        elif entry.class_names is not None:
            check_range(values, entry.class_names, self.title, name)
        check_fits(values, entry.dtype, f"{self.title}: column {name!r}")
        return values.astype(entry.dtype, copy=False)

    @property
    def in_memory(self) -> bool:
        """Whether the decoded examples are held as arrays."""
        return isinstance(self.source, ArraySource)

    @property
    def nbytes(self) -> int:
        """Size of all decoded examples in bytes; `columns` that were added don't count."""
        return len(self) * sum(entry.nbytes for entry in self.sourced_entries.values())

    @property
    def origin(self) -> tuple[Source, np.ndarray | None]:
        """The source that the examples were taken from before any decoding, and their numbers there; None for all."""
        source, taken = getattr(self.source, "origin", None) or (self.source, None)
        if self.rows is None or taken is None:
            return source, taken if self.rows is None else self.rows
        return source, taken[self.rows]

    @property
    def sourced_entries(self) -> dict[str, Entry]:
        """The entries that the source gives."""
        return {name: entry for name, entry in self.entries.items() if name not in self.columns}

    def entry_of(self, name: str) -> Entry:
        """What is known of a column; an unknown name is an error that lists those there are."""
        if name not in self.entries:
            raise NoColumnError(f"{self.title} has no column {name!r}; it has {', '.join(self._names)}")
        return self.entries[name]

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self.entries, *self.columns]))

    def __repr__(self):
        """Its columns: `Dataset(digits (train): 100 examples; image uint8 [8, 8, 1], label int32 of 10 classes)`.

        Of a table, the columns that `features` is made of, too: a label in another guise would be seen.
        """
        known = self.entries  # columns that are read from disk say nothing of themselves
        told = [f"{name} {known[name]}" if name in known else name for name in self._names]
        columns = getattr(self.recipe, "feature_columns", ())
        made = f"; features are made of {listed(columns)}" if columns and "features" in known else ""
        return f"Dataset({self.title}: {len(self)} examples; {', '.join(told)}{made})"

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size, index = len(self), int(example_numbers(index, "a data set"))
        if not -size <= index < size:
            raise IndexError(f"example {index} of {size}")
        index %= size
        row = index if self.rows is None else int(self.rows[index])
        example = self._checked(index, self.source[row], self.sourced_entries)
        return example | {name: column[np.array([index])][0] for name, column in self.columns.items()}

    def read(self, indices) -> dict[str, np.ndarray]:
        """Reads several examples.

        Args:
          indices: integers [n] in [0, N), repeats allowed.

        Returns:
          The columns by name, such as `image` uint8 [n, H, W, C] and `label` int32 [n], fresh arrays.
        """
        indices = example_numbers(indices, "read")
        return self.sourced(indices) | {name: column[indices] for name, column in self.columns.items()}

    def sourced(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads what the source gives of several examples, int64 [n]: all but the `columns`."""
        rows = indices if self.rows is None else self.rows[indices]
        if isinstance(self.source, ArraySource):
            return {name: array[rows] for name, array in self.source.arrays.items()}
        known = self.sourced_entries
        found = {name: np.empty((len(indices), *entry.shape), entry.dtype) for name, entry in known.items()}
        for position, (index, example) in enumerate(zip(indices, self.source.many(rows), strict=True)):
            for name, value in self._checked(int(index), example, known).items():
                found[name][position] = value
        return found

    @property
    def title(self) -> str:
        """Name and split, for messages."""
        return f"{self.name} ({self.split})"

    def _checked(self, index: int, example: Mapping[str, Any], known: Mapping[str, Entry]) -> dict[str, Any]:
        checked = {}
        for name, entry in known.items():
            value = example[name]
            if entry.shape and (np.shape(value) != entry.shape or (self._cuts and self._on_image(name, entry))):
                value = self._resized(name, value, entry, index)
            if entry.class_names is not None:
                value = check_class(name, value, entry, self.title, index)
            elif name != "image":
                check_number(name, value, entry, self.title, index)
            checked[name] = value
        return checked


def check_dataset(given: Any, what: str) -> None:
    """Raises for what is no `Dataset`, naming the way to one."""
    if isinstance(given, Dataset):
        return
    if isinstance(given, Mapping | tuple | list) or hasattr(given, "shape"):
        remedy = "make one of arrays: jt.data.Dataset.from_arrays(images, labels), or from_columns(name=array, ...)"
    elif isinstance(given, str):
        remedy = "load it: jt.data.load(name, split)"
    else:
        remedy = "jt.data.load and jt.data.Dataset.from_arrays make one"
    raise InputError(f"{what} takes a jt.data.Dataset, got {type(given).__name__}; {remedy}")
