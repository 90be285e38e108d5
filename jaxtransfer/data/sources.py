"""Where examples come from."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from jaxtransfer.data.fingerprint import of_array


class Source(Protocol):
    """Where examples come from: read by number, all labels at once without decoding images."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example: `image` uint8 [H, W, C] and `label` int."""
        ...

    def many(self, indices: np.ndarray) -> Iterable[dict[str, Any]]:
        """The examples of several numbers, in their order."""
        ...

    def read_labels(self) -> np.ndarray:
        """All labels, integers [N]."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples held in memory: `images` uint8 [N, H, W, C] and `labels` int32 [N].

    `origin` is the source that they were decoded from, with the numbers of its examples, or None for all of them.
    """

    images: np.ndarray
    labels: np.ndarray
    origin: tuple[Any, np.ndarray | None] | None = None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": int(self.labels[index])}

    def many(self, indices):
        """The examples of several numbers."""
        return (self[index] for index in indices)

    def read_labels(self):
        """All labels, int32 [N]."""
        return self.labels

    def fingerprint(self, rows: np.ndarray | None) -> dict[str, str]:
        """Digests of the examples `rows`, or of all."""
        images, labels = (self.images, self.labels) if rows is None else (self.images[rows], self.labels[rows])
        return {"labels": of_array(labels), "images": of_array(images)}


def relabelled(source: Source, places: np.ndarray) -> Source:
    """A source whose label k has become `places[k]`, int64 [classes]."""
    if isinstance(source, ArraySource):
        return replace(source, labels=np.take(places, source.labels, mode="clip").astype(np.int32))
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
