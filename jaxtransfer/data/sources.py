"""Where examples come from."""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from jaxtransfer.data.fingerprint import of_array

_CHUNK = 256  # examples that one thread decodes at a time


class Source(Protocol):
    """Where examples come from: read by number, all labels at once without decoding images.

    One may have `read_column(name) -> [N, ...]` too, which reads the values of another column without the images.
    """

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example: a value by the name of each entry, such as `image` uint8 [H, W, C] and `label` int."""
        ...

    def many(self, indices: np.ndarray) -> Iterable[dict[str, Any]]:
        """The examples of several numbers, in their order."""
        ...

    def read_labels(self) -> np.ndarray:
        """All labels, integers [N]."""
        ...


def read_column(source: Any, name: str) -> np.ndarray:
    """All values [N, ...] of one column of a source, without decoding images where it knows how."""
    if name == "label":
        return np.asarray(source.read_labels())
    if hasattr(source, "read_column"):
        return source.read_column(name)
    return np.stack([np.asarray(example[name]) for example in source.many(np.arange(len(source)))])


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples held in memory: `arrays` [N, ...] by name.

    `origin` is the source that they were decoded from, with the numbers of its examples, or None for all of them.
    `data` is what a fingerprint calls them in place of the data set's name, where that says in which place they lie.
    """

    arrays: Mapping[str, np.ndarray]
    origin: tuple[Any, np.ndarray | None] | None = None
    data: str | None = None

    @property
    def images(self) -> np.ndarray:
        """The images, uint8 [N, H, W, C]."""
        return self.arrays["image"]

    def __len__(self):
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index):
        return {name: array[index] for name, array in self.arrays.items()}

    def many(self, indices):
        """The examples of several numbers."""
        return (self[index] for index in indices)

    def read_labels(self):
        """All labels, int32 [N]."""
        return self.arrays["label"]

    def read_column(self, name: str) -> np.ndarray:
        """All values of a column, [N, ...]."""
        return self.arrays[name]

    def fingerprint(self, rows: np.ndarray | None) -> dict[str, Any]:
        """Digests of the examples `rows`, or of all: `labels`, `images` and, by name, `arrays`."""
        digests = {name: of_array(array if rows is None else array[rows]) for name, array in self.arrays.items()}
        usual = {key: digests.pop(name) for name, key in (("label", "labels"), ("image", "images")) if name in digests}
        named = {} if self.data is None else {"data": self.data}
        return {**named, **usual, **({"arrays": dict(sorted(digests.items()))} if digests else {})}


@dataclass(frozen=True, eq=False)
class ListSource:
    """Examples that were read one after another, each a dict by name."""

    examples: list[dict[str, Any]]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def many(self, indices):
        """The examples of several numbers."""
        return (self.examples[index] for index in indices)

    def read_labels(self):
        """All labels [N]."""
        return np.array([example["label"] for example in self.examples])


def relabelled(source: Source, places: np.ndarray) -> Source:
    """A source whose label k has become `places[k]`, int64 [classes]."""
    if isinstance(source, ArraySource):
        labels = np.take(places, source.arrays["label"], mode="clip").astype(np.int32)
        return replace(source, arrays={**source.arrays, "label": labels})
    return Relabelled(source, places)


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The examples of a source, label k as `places[k]`."""

    source: Source
    places: np.ndarray

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        return {**example, "label": int(self.places[example["label"]])}

    def many(self, indices):
        """The examples of several numbers."""
        return ({**one, "label": int(self.places[one["label"]])} for one in self.source.many(indices))

    def read_labels(self):
        """All labels, int64 [N]."""
        return np.take(self.places, self.source.read_labels(), mode="clip")

    def read_column(self, name: str) -> np.ndarray:
        """All values of a column, [N, ...]."""
        return self.read_labels() if name == "label" else read_column(self.source, name)


def decode(read: Callable[[np.ndarray], Mapping[str, np.ndarray]], entries: Mapping[str, Any], size: int, threads=None):
    """Returns the arrays [N, ...] by name of `size` examples.

    Args:
      read: gives those of several numbers.
      entries: shape and dtype of each array by name.
      size: N.
      threads: threads that read; by default one per processor, at most 8.
    """
    arrays = {name: np.empty((size, *entry.shape), entry.dtype) for name, entry in entries.items()}

    def one(start):
        for name, values in read(np.arange(start, min(start + _CHUNK, size))).items():
            arrays[name][start : start + _CHUNK] = values

    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        futures = [pool.submit(one, start) for start in range(0, size, _CHUNK)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return arrays
