"""A labelled image data set as random access: one example by its number."""

import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxtransfer.data import images
from jaxtransfer.data.classes import match_classes, not_among
from jaxtransfer.data.columns import Column, as_column, selected
from jaxtransfer.data.labels import class_labels, example_numbers, whole_label
from jaxtransfer.data.sources import ArraySource, Source, relabelled
from jaxtransfer.errors import InputError

_CHUNK = 256  # examples that one thread decodes at a time


@dataclass(frozen=True, eq=False)
class Dataset:
    """A random-access source of labelled images.

    `dataset[i]` is `{"image": uint8 [H, W, C], "label": int}` and the example's entry of each column.

    Attributes:
      name: the name it was loaded by.
      split: its split.
      class_names: one name per class; label k is the class `class_names[k]`.
      image_shape: (H, W, C) of every image.
      source: where examples come from.
      rows: int64 [N], the examples of `source` that belong to it; None for all of them.
      resize: whether images of other sizes are brought to `image_shape`; otherwise they are an error.
      columns: further values of each example by name, numbered as the data set is; see `with_columns`.
      of_image: the columns that are functions of the unaugmented image.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    source: Source
    rows: np.ndarray | None = None
    resize: bool = False
    columns: Mapping[str, Column] = field(default_factory=dict)
    of_image: frozenset[str] = frozenset()

    @classmethod
    def from_arrays(cls, images, labels, *, class_names=None, name="arrays", split="all") -> "Dataset":
        """Makes a data set of arrays in memory.

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
        _check_range(labels, class_names, f"{name} ({split})")
        dataset = cls(name, split, class_names, images.shape[1:], ArraySource(images, labels.astype(np.int32)))
        _ = dataset.labels  # held from now on
        return dataset

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]; read once.

        Raises:
          InputError: names the first example whose label is outside of [0, classes).
        """
        labels = np.asarray(self.source.read_labels())
        labels = labels if self.rows is None else labels[self.rows]
        if labels.size and not (labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)):
            whole_label(labels.tolist()[0], self._title, 0)  # raises
        _check_range(labels, self.class_names, self._title)
        return labels.astype(np.int32)

    @property
    def in_memory(self) -> bool:
        """Whether the decoded images are held as arrays."""
        return isinstance(self.source, ArraySource)

    @property
    def nbytes(self) -> int:
        """Size of all decoded images in bytes."""
        return len(self) * int(np.prod(self.image_shape))

    @property
    def origin(self) -> tuple[Source, np.ndarray | None]:
        """The source that the examples were taken from before any decoding, and their numbers there; None for all."""
        source, taken = getattr(self.source, "origin", None) or (self.source, None)
        if self.rows is None or taken is None:
            return source, taken if self.rows is None else self.rows
        return source, taken[self.rows]

    def __repr__(self):
        """Its columns: `Dataset(digits (train): 100 examples; image uint8 [8, 8, 1], label int32 of 10 classes)`."""
        listed = [f"image uint8 {list(self.image_shape)}", f"label int32 of {self.classes} classes"]
        for name, column in self.columns.items():  # those that are read from disk say nothing of themselves
            known = isinstance(column, np.ndarray)
            listed.append(f"{name} {column.dtype} {list(column.shape[1:])}" if known else name)
        return f"Dataset({self._title}: {len(self)} examples; {', '.join(listed)})"

    def __len__(self) -> int:
        return len(self.source) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size, index = len(self), int(example_numbers(index, "a data set"))
        if not -size <= index < size:
            raise IndexError(f"example {index} of {size}")
        index %= size
        example = self._checked(index, self.source[index if self.rows is None else int(self.rows[index])])
        return example | {name: column[np.array([index])][0] for name, column in self.columns.items()}

    def read(self, indices) -> dict[str, np.ndarray]:
        """Reads several examples.

        Args:
          indices: integers [n] in [0, N), repeats allowed.

        Returns:
          `image` uint8 [n, H, W, C], `label` int32 [n] and the columns [n, ...], fresh arrays.
        """
        indices = example_numbers(indices, "read")
        return self._images(indices) | {name: column[indices] for name, column in self.columns.items()}

    def with_columns(self, columns: Mapping[str, Any], *, of_image: bool = False) -> "Dataset":
        """Adds values to each example, which batches then hold beside `image` and `label`.

        `select`, `take` and `subset` choose from them, `decoded` and the pipelines carry them.

        Args:
          columns: by name, an array [N, ...] or an object with `__len__` and `__getitem__(int64 [n]) -> [n, ...]`
            that reads what it is asked for; entry i belongs to example i of this data set.
          of_image: whether they are functions of the unaugmented image, such as a teacher's outputs; a pipeline
            then refuses to augment. An example's number, say, holds for any view of it.

        Raises:
          InputError: for another length or a name that is taken.

        Example:
          >>> numbered = dataset.with_columns({"index": np.arange(len(dataset))})
        """
        added = {name: as_column(column) for name, column in columns.items()}
        for name, column in added.items():
            if name in (taken := ["image", "label", "mask", *self.columns]):
                raise InputError(
                    f"{self._title}: a column can't be called {name!r}; choose another name than {', '.join(taken)}"
                )
            size = column.shape[:1] if isinstance(column, np.ndarray) else (len(column),)
            if size != (len(self),):
                raise InputError(
                    f"{self._title}: column {name!r} must have one entry for each of the {len(self)} examples, got "
                    f"{size[0] if size else 'a single value'}; add columns before choosing examples"
                )
        marked = self.of_image | added.keys() if of_image else self.of_image
        more = replace(self, columns={**self.columns, **added}, of_image=marked)
        if "labels" in vars(self):  # read once
            vars(more)["labels"] = self.labels
        return more

    def _images(self, indices):
        rows = indices if self.rows is None else self.rows[indices]
        if isinstance(self.source, ArraySource):
            return {"image": self.source.images[rows], "label": self.source.labels[rows]}
        image = np.empty((len(indices), *self.image_shape), np.uint8)
        label = np.empty(len(indices), np.int32)
        for position, (index, example) in enumerate(zip(indices, self.source.many(rows), strict=True)):
            example = self._checked(int(index), example)
            image[position], label[position] = example["image"], example["label"]
        return {"image": image, "label": label}

    def select(self, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """The data set of the given examples, in the given order.

        Args:
          indices: integers [n] in [0, N), repeats allowed.

        Raises:
          InputError: for an index outside of [0, N), or one that is no whole number.
        """
        indices = example_numbers(indices, "select").reshape(-1)
        for index in indices[(indices < 0) | (indices >= len(self))][:1]:
            raise InputError(f"{self._title}: example {index} asked, it has {len(self)}, numbered from 0")
        columns = {name: selected(column, indices) for name, column in self.columns.items()}
        return replace(self, rows=indices if self.rows is None else self.rows[indices], columns=columns)

    def take(self, n: int) -> "Dataset":
        """The first `n` examples; all of them when there are fewer."""
        n = int(example_numbers(n, "take"))
        if n < 0:
            raise InputError(f"take needs a number of examples of at least 0, got {n}")
        return self.select(np.arange(min(n, len(self))))

    def subset(self, *, per_class: int, seed: int = 0) -> "Dataset":
        """Chooses `per_class` examples of each class without replacement.

        The choice is a function of (seed, the labels); for one seed a smaller choice lies within a larger
        one.

        Args:
          per_class: examples per class, at least 1.
          seed: non-negative integer.

        Returns:
          The chosen examples, in the order of the whole data set.

        Raises:
          InputError: names a class with too few examples.
        """
        per_class = int(example_numbers(per_class, "subset"))
        if per_class < 1 or seed < 0:
            raise InputError(f"subset needs per_class >= 1 and seed >= 0, got {per_class} and {seed}")
        chosen = []
        for label, class_name in enumerate(self.class_names):
            members = np.flatnonzero(self.labels == label)
            if len(members) < per_class:
                raise InputError(
                    f"{self._title}: class {class_name!r} has {len(members)} examples, {per_class} per class "
                    "asked; ask for fewer"
                )
            chosen.append(np.random.default_rng([seed, label]).permutation(members)[:per_class])
        return self.select(np.sort(np.concatenate(chosen)))

    def as_classes(self, class_names: Sequence[str], *, whose: str = "the classes asked for") -> "Dataset":
        """The same examples with the labels that other class names give them, for a model of those to be evaluated.

        Names are found wherever they stand, and classes may be left over; see `match_classes` for names that are
        numbers and for data without names.

        Args:
          class_names: the classes that label k is to stand for.
          whose: what they are of, for messages.

        Raises:
          InputError: names a class that occurs here and is not among them; or where names don't tell.
        """
        found = match_classes(self.class_names, class_names, of=self._title, whose=whose).places
        for label in np.flatnonzero(found < 0):
            if label in self.labels:
                raise not_among(self.class_names[label], class_names, of=self._title, whose=whose)
        labels = found[self.labels].astype(np.int32)
        more = replace(self, class_names=tuple(class_names), source=relabelled(self.source, found))
        vars(more)["labels"] = labels  # read once
        return more

    def decoded(self, threads: int | None = None) -> "Dataset":
        """The same data set with decoded images and labels held in memory.

        Args:
          threads: threads that decode; by default one per processor, at most 8.

        Raises:
          InputError: names an example whose image has another shape or whose label is out of range.
        """
        if self.in_memory and self.rows is None:
            return self
        image = np.empty((len(self), *self.image_shape), np.uint8)
        label = np.empty(len(self), np.int32)

        def decode(start):
            part = self._images(np.arange(start, min(start + _CHUNK, len(self))))
            image[start : start + _CHUNK], label[start : start + _CHUNK] = part["image"], part["label"]

        with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
            futures = [pool.submit(decode, start) for start in range(0, len(self), _CHUNK)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return replace(self, source=ArraySource(image, label, self.origin), rows=None, resize=False)

    @property
    def _title(self):
        return f"{self.name} ({self.split})"

    def _checked(self, index, example):
        image, label = example["image"], whole_label(example["label"], self._title, index)
        if not 0 <= label < self.classes:
            raise _out_of_range(index, label, self.class_names, self._title)
        if image.shape != self.image_shape:
            if not self.resize:
                raise InputError(
                    f"{self._title}: example {index} has an image of shape {image.shape}, expected "
                    f"{self.image_shape}; pass image_shape=(height, width, channels) to resize all"
                )
            image = images.fit(image, self.image_shape)
        return {**example, "image": image, "label": label}


def check_dataset(given: Any, what: str) -> None:
    """Raises for what is no `Dataset`, naming the way to one."""
    if isinstance(given, Dataset):
        return
    if isinstance(given, Mapping | tuple | list) or hasattr(given, "shape"):
        remedy = "make one of arrays: jt.data.Dataset.from_arrays(images, labels)"
    elif isinstance(given, str):
        remedy = "load it: jt.data.load(name, split)"
    else:
        remedy = "jt.data.load and jt.data.Dataset.from_arrays make one"
    raise InputError(f"{what} takes a jt.data.Dataset, got {type(given).__name__}; {remedy}")


def _check_range(labels: np.ndarray, class_names, title: str) -> None:
    """Raises for the first label [N] that is no class; before any cast, which would bring it into the range."""
    for index in np.flatnonzero((labels < 0) | (labels >= len(class_names)))[:1]:
        raise _out_of_range(index, labels[index], class_names, title)


def _out_of_range(index, label, class_names, title: str) -> InputError:
    return InputError(
        f"{title}: example {index} has label {label}, expected 0 to {len(class_names) - 1} "
        f"({len(class_names)} classes); mend the data or take a split with labels"
    )
