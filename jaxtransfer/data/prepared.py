"""tfds data sets that are prepared on disk: finding, opening and reading them without TensorFlow."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data import images
from jaxtransfer.data.builders import reason_of
from jaxtransfer.data.dataset import Dataset
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
    """

    examples: Any
    undecoded: Any
    name: str
    parts: tuple[tuple[Path, int], ...]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return _image_and_label(self._read(self.examples, [int(index)])[0])

    def many(self, indices):
        """The examples of several numbers; faster than one by one."""
        return map(_image_and_label, self._read(self.examples, [int(index) for index in indices]))

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
        labels = np.empty(len(self), np.int64)
        for start in range(0, len(self), 1024):
            part = self._read(self.undecoded, list(range(start, min(start + 1024, len(self)))))
            labels[start : start + 1024] = [example["label"] for example in part]
        return labels

    def fingerprint(self, rows) -> dict[str, str]:
        """The set's name and version, digests of its record files and of the numbers of its examples."""
        rows = np.arange(len(self)) if rows is None else rows
        return {
            "data": self.name,
            "records": of_records(dict.fromkeys(path for path, _ in self.parts)),
            "rows": of_array(rows),
        }


def _image_and_label(example):
    return {"image": example["image"], "label": example["label"]}


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


def image_and_classes(name: str, features) -> tuple[tuple, tuple[str, ...]]:
    """Checks that a data set has images and class labels.

    Args:
      name: for messages.
      features: the builder's `info.features`.

    Returns:
      The image shape, None where sizes vary, and the class names.

    Raises:
      InputError: without a uint8 feature `image` or a class-label feature `label`.
    """
    names = sorted(features.keys()) if hasattr(features, "keys") else []
    known = ", ".join(names) or repr(features)
    image = features["image"] if "image" in names else None
    if image is None or len(image.shape) != 3 or image.np_dtype != np.uint8:
        raise InputError(f"{name} has no uint8 feature 'image' [H, W, C]; its features: {known}")
    label = features["label"] if "label" in names else None
    if label is None or not getattr(label, "num_classes", None):
        raise InputError(f"{name} has no class-label feature 'label'; its features: {known}")
    if tuple(label.shape) != ():
        raise InputError(
            f"{name} has several labels per image, feature 'label' is of shape {tuple(label.shape)}; expected one "
            "class per image"
        )
    return tuple(image.shape), tuple(label.names)


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


def open_builder(builder, name: str, split: str, image_shape=None) -> Dataset:
    """Opens a prepared random-access builder.

    Args:
      builder: a tfds builder in array_record form.
      name: the name that the data set gets.
      split: in tfds' syntax.
      image_shape: (H, W, C) to which images are resized; None keeps them.

    Returns:
      The data set.

    Raises:
      InputError: for an unknown split, unusable features, or images of varying size without `image_shape`.
    """
    shape, class_names = image_and_classes(name, builder.info.features)
    check_split(name, split, builder.info.splits)
    if image_shape is not None:
        shape = images.check_shape(image_shape)
    elif None in shape:
        raise InputError(f"{name} has images of varying size; pass image_shape=(height, width, channels)")
    with quiet_tfds() as tfds:
        try:
            source = TfdsSource(
                builder.as_data_source(split),
                builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}),
                builder.info.full_name,
                _parts(builder, split),
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
    return Dataset(name, split, class_names, shape, source, resize=image_shape is not None)


def _parts(builder, split: str) -> tuple[tuple[Path, int], ...]:
    parts = builder.info.splits[split].file_instructions
    return tuple((Path(part.filename), int(part.take)) for part in parts)
