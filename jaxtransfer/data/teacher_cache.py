"""What a teacher gives for each example of a data set: a tfds source, read as columns.

The folder is a tfds data set in array_record form, one record per example in the data set's order, which
`tfds.builder_from_directory(folder).as_data_source("examples")` reads too. A note beside it says of which data and
which teacher it is.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.builders import check_features, reason_of
from jaxtransfer.data.cache_words import called, how_anew, same_again
from jaxtransfer.data.columns import Column
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded, read_text

NOTE = "teacher_cache.json"
_FORMAT = 1
_DTYPES = ("float32", "float16")
SPLIT = "examples"
_CHUNK = 1024  # records read at a time
_NOTED = {"data", "split", "examples", "image_shape", "fingerprint", "teacher", "outputs"}
_MEMORY_LIMIT = 2 * 2**30  # bytes; larger caches are read from their files each time
_FINGERPRINTED = 2**30  # bytes of images up to which each of them counts in a fingerprint; else some do
_SOME = 1000


class DamagedCacheError(InputError):
    """A teacher cache whose files are not what was written."""


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """A teacher's outputs on a data set; made by `open_outputs`.

    Attributes:
      directory: where it lies.
      note: what it is of: see `outputs_note`.
      records: the random-access tfds source of its records.
    """

    directory: Path
    note: dict[str, Any]
    records: Any

    def __len__(self) -> int:
        return self.note["examples"]

    @property
    def nbytes(self) -> int:
        """Size of all outputs in bytes."""
        return len(self) * bytes_per_example(self.note)

    def columns_for(self, dataset: Dataset, teacher: str = "teacher") -> dict[str, Column]:
        """The outputs as columns of the data set that they were computed on.

        Args:
          dataset: that data set, loaded as it was then; choose examples after the columns are added.
          teacher: what the columns' names begin with; "" for the outputs' own names.

        Returns:
          `teacher_logits` [N, C], say, for each output: arrays below 2 GiB in all, else what reads the files.

        Raises:
          InputError: where the data set is another one, or the files are damaged.
        """
        self._check(dataset)
        prefix = f"{teacher}_" if teacher else ""
        if self.nbytes >= _MEMORY_LIMIT:
            return {f"{prefix}{name}": _StoredColumn(self, name) for name in self.note["outputs"]}
        return {f"{prefix}{name}": values for name, values in self._loaded.items()}

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The output `name` [n, ...] of the examples `rows`, int64 [n]."""
        output = self.note["outputs"][name]
        if not len(rows):
            return np.empty((0, *output["shape"]), output["dtype"])
        return np.stack([record[name] for record in self._records(rows)])

    def verify(self) -> None:
        """Reads every record, a few at a time.

        Raises:
          DamagedCacheError: where one is unreadable or out of order.
        """
        for rows in self._chunks():
            self._records(rows)

    @functools.cached_property
    def _loaded(self):
        outputs = self.note["outputs"]
        arrays = {name: np.empty((len(self), *o["shape"]), o["dtype"]) for name, o in outputs.items()}
        for rows in self._chunks():
            for row, record in zip(rows, self._records(rows), strict=True):
                for name, array in arrays.items():
                    array[row] = record[name]
        return arrays

    def _chunks(self):
        return (np.arange(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK))

    def _records(self, rows):
        rows = [int(row) for row in rows]
        try:
            records = self.records.__getitems__(rows)
            if [int(record["example"]) for record in records] != rows:
                raise ValueError("its records are not in the order of the examples")
            for name, output in self.note["outputs"].items():
                for found in {(record[name].dtype.name, record[name].shape) for record in records}:
                    if found != (output["dtype"], tuple(output["shape"])):
                        raise ValueError(f"its note has {output} for the output {name!r}, the records {found}")
        except Exception as error:  # readers raise many types on damaged files
            raise _damaged(self.directory, error, self.note) from error
        return records

    def _check(self, dataset):
        now, then = _facts(dataset), {key: self.note[key] for key in _facts(dataset)}
        expected, got = described(then), described(now)
        if now == then:
            if _fingerprint(dataset) == self.note["fingerprint"]:
                return
            got = "a data set of that name with other labels or images"
        chosen = " (attach the cache before choosing examples)" if dataset.rows is not None else ""
        raise InputError(
            f"the {called(self.note)} {self.directory} was written for {expected}; got {got}{chosen}; write it anew: "
            f"{how_anew(self.note, dataset.name, dataset.split)}"
        )


@dataclass(frozen=True, eq=False)
class _StoredColumn:
    """An output that is read from the files each time."""

    cache: TeacherCache
    name: str

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, rows):
        return self.cache.read(self.name, rows)


def attach_outputs(
    dataset: Dataset, cache: TeacherCache, teacher: str = "teacher", *, classes: np.ndarray | None = None
) -> Dataset:
    """Adds a teacher's outputs to the data set that they were computed on.

    Args:
      dataset: that data set, whole; `subset`, `select` and `take` come after.
      cache: what `open_outputs` gave.
      teacher: what the columns' names begin with, and `jt.cached` is called; of several teachers each its own.
      classes: integers [C], where the teacher counts the classes otherwise than the data set: which of its logits
        belongs to class c. A cache knows numbers alone; without `classes` they are taken to mean the same.

    Returns:
      The data set with the columns `teacher_logits`, ...; pipelines refuse to augment it.

    Raises:
      InputError: where the data set is another one, or the files are damaged.
    """
    columns = cache.columns_for(dataset, teacher)
    if classes is not None and (name := f"{teacher}_logits") in columns:
        columns = {**columns, name: _of_classes(columns[name], np.asarray(classes))}
    return dataset.with_columns(columns, of_image=True)


def _of_classes(column: Any, classes: np.ndarray) -> Column:
    return column[:, classes] if isinstance(column, np.ndarray) else _ClassesOf(column, classes)


@dataclass(frozen=True, eq=False)
class _ClassesOf:
    """Some logits of a column, which stays unread."""

    column: Any
    classes: np.ndarray

    def __len__(self):
        return len(self.column)

    def __getitem__(self, rows):
        return self.column[rows][:, self.classes]


def outputs_note(dataset: Dataset, outputs: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache is of; two caches of one note hold the same.

    Args:
      dataset: the examples.
      outputs: by name, anything with the `shape` and `dtype` of one example's output: float32 or float16.
      teacher: what tells one teacher from another, as JSON types.

    Returns:
      JSON types: the data's name, split, number of examples, image shape, resizing and fingerprint, the teacher, the
      outputs' shapes and types, and the version of the format.
    """
    return {
        "format": _FORMAT,
        **_facts(dataset),
        "resize": dataset.resize,
        "fingerprint": _fingerprint(dataset),
        "teacher": json.loads(json.dumps(dict(teacher))),
        "outputs": {name: {"shape": list(o.shape), "dtype": np.dtype(o.dtype).name} for name, o in outputs.items()},
    }


def open_outputs(directory) -> TeacherCache:
    """Opens a teacher cache.

    Args:
      directory: the folder that `write_outputs` wrote.

    Returns:
      The cache.

    Raises:
      InputError: where the folder is no cache or of another version.
      DamagedCacheError: where records are missing or unreadable.
    """
    directory = expanded(directory)
    note = read_note(directory)
    with quiet_tfds() as tfds:
        try:
            check_features(directory)
            builder: Any = tfds.builder_from_directory(directory)
            records = builder.as_data_source(SPLIT)
            size = len(records)
        except Exception as error:  # readers raise many types on damaged files
            raise _damaged(directory, error, note) from error
    cache = TeacherCache(directory, note, records)
    if size != note["examples"]:
        raise _damaged(directory, f"it has {size} records, its note says {note['examples']}", note)
    cache.read(next(iter(note["outputs"])), np.array([0, size - 1]))  # damaged files show here rather than later
    return cache


def bytes_per_example(note: Mapping[str, Any]) -> int:
    """Size of all outputs of one example in bytes."""
    return sum(int(np.prod(o["shape"])) * np.dtype(o["dtype"]).itemsize for o in note["outputs"].values())


def read_note(directory: Path) -> dict[str, Any]:
    """The note of a cache.

    Raises:
      InputError: where the folder is no cache or of another version.
      DamagedCacheError: where the note is not what was written.
    """
    try:
        note = json.loads(read_text(directory / NOTE))
        version = note["format"]
        if version == _FORMAT:
            _check_note(note)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{directory} is no teacher cache, there is no {NOTE} in it; write one: jaxtransfer cache-teacher RUN "
            f"--out DIR"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(directory, error) from None
    if version != _FORMAT:
        raise InputError(
            f"the {called(note)} {directory} is of format {version}, expected {_FORMAT}; write it anew: "
            f"{how_anew(note)}"
        )
    return note


def _check_note(note: dict[str, Any]) -> None:
    """Raises `ValueError` where the note is not of the shape that is written."""
    if missing := _NOTED - note.keys():
        raise ValueError(f"its note lacks {min(missing)!r}")
    for key in ("data", "split", "fingerprint"):
        if not isinstance(note[key], str):
            raise ValueError(f"its note has {note[key]!r:.60} for {key!r}, expected a text")
    if not (
        _whole(note["examples"]) and isinstance(note["image_shape"], list) and all(map(_whole, note["image_shape"]))
    ):
        raise ValueError("its note tells no number of examples, or no shape of the images")
    if not isinstance(note["teacher"], dict) or not isinstance(note["outputs"], dict) or not note["outputs"]:
        raise ValueError("its note tells of no teacher or no outputs")
    for name, output in note["outputs"].items():
        shape, dtype = (output.get("shape"), output.get("dtype")) if isinstance(output, dict) else (None, None)
        if not isinstance(shape, list) or not all(map(_whole, shape)) or dtype not in _DTYPES:
            raise ValueError(f"its note has {output!r:.60} for the output {name!r}, expected a shape and a dtype")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _facts(dataset):
    return {
        "data": dataset.name,
        "split": dataset.split,
        "examples": len(dataset),
        "image_shape": list(dataset.image_shape) if "image" in dataset.entries else [],
    }


def described(facts: Mapping[str, Any]) -> str:
    """Says in a message which data a note is of."""
    what = f"images {tuple(facts['image_shape'])}" if facts["image_shape"] else "examples"
    return f"{facts['data']} ({facts['split']}), {facts['examples']} {what}"


def _fingerprint(dataset):
    known = dataset.sourced_entries  # of what was added, such as another teacher's outputs, nothing counts
    digest = hashlib.sha256(dataset.labels.astype("<i4").tobytes() if "label" in known else b"")
    size = len(dataset) * sum(entry.nbytes for name, entry in known.items() if name != "label")
    count = len(dataset) if size <= _FINGERPRINTED else min(_SOME, len(dataset))
    for rows in np.array_split(np.linspace(0, len(dataset) - 1, count).round().astype(np.int64), -(-count // _CHUNK)):
        values = dataset.sourced(rows)
        for name in sorted(values.keys() - {"label"}):
            digest.update(values[name].tobytes())
    return digest.hexdigest()


def _damaged(directory, error, note: Mapping[str, Any] = {}):
    reason = error if isinstance(error, str) else reason_of(error)
    return DamagedCacheError(f"the {called(note)} {directory} is damaged: {reason}; {same_again(note)} writes it anew")
