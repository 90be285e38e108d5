"""tfds data sets that are prepared on disk: finding, opening and reading them without TensorFlow."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.builders import reason_of
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.features import USUAL, Asked, Chosen, choose
from jaxtransfer.data.fingerprint import of_array, of_records
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.errors import InputError, unknown

_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True, eq=False)
class TfdsSource:
    """Examples of one split of a tfds builder.

    Attributes:
      examples: the split's random-access source with decoded images.
      undecoded: the same without decoding images.
      name: the builder's full name, "cifar10/3.0.2".
      parts: the record files of the split in order, with the number of examples of each.
      chosen: the features that are read, and the columns that they become.
    """

    examples: Any
    undecoded: Any
    name: str
    parts: tuple[tuple[Path, int], ...]
    chosen: Chosen

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self._columns(self._read(self.examples, [int(index)])[0])

    def many(self, indices):
        """The examples of several numbers; faster than one by one."""
        return map(self._columns, self._read(self.examples, [int(index) for index in indices]))

    def _columns(self, example):
        return {name: example[feature][..., 0] if flat else example[feature] for name, feature, flat in self._plan}

    @functools.cached_property
    def _plan(self) -> list[tuple[str, str, bool]]:
        """Each column with its feature, and whether that is a picture of classes, whose one channel goes."""
        return [(name, feature, name in self.chosen.flat) for name, feature in self.chosen.features.items()]

    def _read(self, examples, indices: list[int]):
        """The records; an unreadable one is named with its file."""
        try:
            return examples.__getitems__(indices)
        except Exception as error:  # readers and decoders raise many types on damaged files
            for index in indices:
                try:
                    examples[index]
                except Exception as first:
                    raise InputError(
                        f"example {index} of {self.name} in {self._file_of(index)} is damaged: {reason_of(first)}; "
                        "restore the file, or prepare the set anew"
                    ) from first
            raise InputError(f"{self.name} cannot be read: {reason_of(error)}; try again") from error

    def _file_of(self, index: int) -> str:
        for path, count in self.parts:
            if index < count:
                return str(path)
            index -= count
        return "its files"

    def read_labels(self):
        """All labels, int64 [N]; reads each record once and decodes no image."""
        return self.read_column("label")

    def read_column(self, name: str) -> np.ndarray:
        """All values of a column [N]; decodes images only for one that is stored as such."""
        feature, entry = self.chosen.features[name], self.chosen.entries[name]
        flat = name in self.chosen.flat
        examples = self.examples if feature in self.chosen.pictures else self.undecoded
        dtype = np.int64 if entry.dtype.kind in "iu" else entry.dtype
        values = np.empty((len(self), *entry.shape), dtype)
        for start in range(0, len(self), 1024):
            part = self._read(examples, list(range(start, min(start + 1024, len(self)))))
            values[start : start + 1024] = [example[feature][..., 0] if flat else example[feature] for example in part]
        return values

    def fingerprint(self, rows) -> dict[str, Any]:
        """The set's name and version, digests of its record files and of the numbers of its examples, its features."""
        rows = np.arange(len(self)) if rows is None else rows
        features = self.chosen.features
        return {
            "data": self.name,
            "records": of_records(dict.fromkeys(path for path, _ in self.parts)),
            "rows": of_array(rows),
            **({"features": features} if features != {"image": "image", "label": "label"} else {}),
        }


def version_dirs(folder: Path) -> list[Path]:
    """The prepared versions below a data set's (or config's) folder, oldest first."""
    found = [child for child in folder.glob("*.*.*") if _VERSION.fullmatch(child.name)]
    found = [child for child in found if (child / "dataset_info.json").is_file()]
    return sorted(found, key=lambda child: tuple(map(int, child.name.split("."))))


def prepared_sets(data_dir: Path) -> dict[str, Path]:
    """The prepared data sets below a tfds folder.

    Args:
      data_dir: a tfds data folder; it may be missing.

    Returns:
      Name ("cifar10" or "digits/upright") to the folder of its newest version.
    """
    found = {}
    if data_dir.is_dir():
        for child in sorted(data_dir.iterdir()):
            for folder in [child, *sorted(child.glob("*/"))] if child.is_dir() else []:
                if not folder.name.startswith(".") and (versions := version_dirs(folder)):
                    found[folder.relative_to(data_dir).as_posix()] = versions[-1]
    return found


def find(name: str, data_dir: Path) -> Path | None:
    """The folder of a prepared data set.

    Args:
      name: "name", "name/config", each with an optional ":1.2.3".
      data_dir: a tfds data folder.

    Returns:
      The folder of the named or the newest version; None when it is not there.
    """
    base, _, version = name.partition(":")
    if not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)?", base):
        return None
    versions = version_dirs(data_dir / base)
    if version and version != "*.*.*":
        versions = [folder for folder in versions if folder.name == version]
    return versions[-1] if versions else None


def check_split(name: str, split: str, splits) -> None:
    """Checks that a split, which may be a sum and sliced, names known splits.

    Args:
      name: the data set, for messages.
      split: in tfds' syntax, e.g. "train", "train[:100]", "train[10%:]+test".
      splits: the known names.

    Raises:
      InputError: for an unknown split.
    """
    for part in split.split("+"):
        base = part.partition("[")[0].strip()
        if base not in splits and base != "all":
            raise unknown(f"split of {name}", base, splits)


def open_builder(builder, name: str, split: str, image_shape=None, asked: Asked = USUAL) -> Dataset:
    """Opens a prepared random-access builder.

    Args:
      builder: a tfds builder in array_record form.
      name: the name that the data set gets.
      split: in tfds' syntax.
      image_shape: (H, W, C) to which images are resized; None keeps them.
      asked: the features to load; images with a label each by default.

    Returns:
      The data set.

    Raises:
      InputError: for an unknown split, unusable features, or images of varying size without `image_shape`.
    """
    with quiet_tfds():
        chosen = choose(name, builder.info.features, asked, image_shape)
    check_split(name, split, builder.info.splits)
    with quiet_tfds() as tfds:

        def left(features):
            return {feature: tfds.decode.SkipDecoding() for feature in features}

        try:
            source = TfdsSource(
                builder.as_data_source(split, decoders=left(set(chosen.pictures) - {*chosen.features.values()})),
                builder.as_data_source(split, decoders=left(chosen.pictures)),
                builder.info.full_name,
                _parts(builder, split),
                chosen,
            )
            size = len(source)
            if size:
                source[0]  # damaged files show here, not in the middle of a run
        except InputError:
            raise
        except Exception as error:  # readers raise many types on wrong slices and damaged files
            raise InputError(
                f"cannot open split {split!r} of {name} in {builder.data_dir}: {reason_of(error)}"
            ) from error
    if not size:
        raise InputError(f"split {split!r} of {name} has no examples; its splits: {', '.join(builder.info.splits)}")
    options = {"entries": chosen.entries, "of_image": chosen.of_image, "resize": image_shape is not None}
    return Dataset(name, split, source=source, **options)


def _parts(builder, split: str) -> tuple[tuple[Path, int], ...]:
    parts = builder.info.splits[split].file_instructions
    return tuple((Path(part.filename), int(part.take)) for part in parts)
