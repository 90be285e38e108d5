"""What tells one data set from another, cheaply: names, labels, counts, and a digest of the contents."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError

_WHOLE = 2**28  # bytes of one array or of a set of record files up to which every byte counts; of more, some do
_PLACES = 64  # parts of a longer file that count, spread over it
_PART = 512  # bytes of an image file that count, in its middle and at its end
_SOME = 256  # entries of a column that is not in memory that count


def fingerprint(dataset) -> dict[str, Any]:
    """Returns what a data set is, to be compared with what it was: equal parts mean the same examples in one order.

    It costs about 10 µs per image file, and at most half a second per array or tfds set. Where the files lie, and when
    they were written, does not count: a copy has the same fingerprint, and so has the same set `decoded()`. Of image
    files count name, class, size, and bytes from the middle and the end (where PNG has its checksum); of arrays and
    record files of up to 256 MiB every byte, of larger ones parts that are spread over them. What changes nothing of
    that goes unseen.

    Args:
      dataset: a `jaxtransfer.data.Dataset`.

    Returns:
      By part, JSON types: `data` and `split` (its names; "folder" for any folder), `examples`, `image_shape`,
      `class_names`; `resizing` where images are not just stretched; `labels` and `images`, or for a tfds set `records`
      and `rows`; where it has other columns, `arrays` and `class_names of` those, and `columns` that were added. Long
      parts are digests.

    Raises:
      InputError: names a file that cannot be read.
    """
    source, rows = dataset.origin
    told = getattr(source, "fingerprint", None)
    return {
        "data": dataset.name,
        "split": dataset.split,
        "examples": len(dataset),
        **_of_entries(dataset.entries),
        **({} if dataset.resizing is None else {"resizing": str(dataset.resizing)}),
        **(told(rows) if told is not None else _of_other(dataset)),
        **({"columns": _of_columns(dataset.columns)} if dataset.columns else {}),
    }


def _of_entries(entries) -> dict[str, Any]:
    """What is known of the columns; `image_shape` and `class_names` where there are images and labels."""
    told: dict[str, Any] = {}
    if "image" in entries:
        told["image_shape"] = " x ".join(map(str, entries["image"].shape))
    if "label" in entries and entries["label"].class_names is not None:
        told["class_names"] = _brief(entries["label"].class_names)
    named = {name: entry for name, entry in entries.items() if name != "label" and entry.class_names is not None}
    if named:
        told["class_names of"] = {name: _brief(entry.class_names) for name, entry in sorted(named.items())}
    return told


def _of_other(dataset) -> dict[str, Any]:
    """The parts of a data set of a source of someone else's, which is read here and there."""
    known, read = dataset.sourced_entries, dataset.sourced(_spread(len(dataset)))
    told: dict[str, Any] = {"labels": of_array(dataset.labels)} if "label" in known else {}
    if "image" in known:
        told["images"] = of_array(read["image"])
    if others := sorted(known.keys() - {"image", "label"}):
        told["arrays"] = {name: of_array(read[name]) for name in others}
    return told


def _of_columns(columns) -> str:
    values = {
        name: column if isinstance(column, np.ndarray) else column[_spread(len(column))]
        for name, column in columns.items()
    }
    return json.dumps({name: of_array(value) for name, value in sorted(values.items())})


def _spread(size: int) -> np.ndarray:
    return np.linspace(0, size - 1, min(size, _SOME)).round().astype(np.int64)


def _brief(names) -> str:
    """Class names as one text, of many of them a digest."""
    text = json.dumps(list(names), ensure_ascii=True)
    return text if len(text) <= 200 else f"{len(names)} names, {hashlib.sha256(text.encode()).hexdigest()}"


def of_array(array) -> str:
    """Returns a digest of an array: its type, shape and bytes; of more than 256 MiB, of entries spread over it."""
    array = np.asarray(array)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    if array.nbytes > _WHOLE:
        count = max(1, _WHOLE * len(array) // array.nbytes)
        array = array[np.linspace(0, len(array) - 1, count).round().astype(np.int64)]
    digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return digest.hexdigest()


def of_files(files: Iterable[tuple[str, Any]]) -> str:
    """Returns a digest of small files, (name, path) pairs in their order: names, sizes and parts of the bytes count."""
    digest = hashlib.sha256()
    for name, path in files:
        with _opened(path) as handle:
            size = os.fstat(handle).st_size
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
            starts = [0, _PART] if size <= 2 * _PART else [size // 2, size - _PART]
            for start in starts:
                digest.update(os.pread(handle, _PART, start))
    return digest.hexdigest()


def of_records(paths: Iterable[Any]) -> str:
    """Returns a digest of a few large files: names, sizes, and their bytes, of long ones parts spread over them."""
    paths = list(paths)
    share = _WHOLE // max(1, len(paths))
    digest = hashlib.sha256()
    for path in paths:
        with _opened(path) as handle:
            size = os.fstat(handle).st_size
            digest.update(f"{os.path.basename(path)}\0{size}\0".encode(errors="surrogateescape"))
            part = size if size <= share else share // _PLACES
            for start in [0] if part == size else np.linspace(0, size - part, _PLACES).astype(int).tolist():
                digest.update(os.pread(handle, part, start))
    return digest.hexdigest()


class _opened:
    """A file descriptor, for a `with`; a third of the cost of `open`."""

    def __init__(self, path):
        self.path = path

    def __enter__(self) -> int:
        try:
            self.handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}; mend the data or take what is left") from None
        return self.handle

    def __exit__(self, *_):
        os.close(self.handle)
