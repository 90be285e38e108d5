"""Data sets of image files in class folders."""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtransfer.data import images
from jaxtransfer.data.class_folders import LAYOUT, find_images
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.fingerprint import of_array, of_files
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded
from jaxtransfer.resizing import Resizing

_LOOKED_AT = 64  # images by which a folder's sizes are told
_LOG = logging.getLogger("jaxtransfer")


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Examples from image files: `files` are (path, label) pairs, images RGB, or RGBA with 4 `channels`."""

    files: tuple[tuple[Path, int], ...]
    channels: int = 3

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return {"image": images.read(path, self.channels), "label": label}

    def many(self, indices):
        """The examples of several numbers."""
        return (self[index] for index in indices)

    def read_labels(self):
        """All labels, int32 [N]."""
        return np.array([label for _, label in self.files], np.int32)

    def fingerprint(self, rows) -> dict[str, str]:
        """Digests of the labels, and of the files' names and contents, for the examples `rows`, or for all."""
        files = self.files if rows is None else [self.files[row] for row in rows]
        labels = np.array([label for _, label in files], np.int32)
        images = of_files((f"{label}/{path.name}", path) for path, label in files)
        return {"data": "folder", "labels": of_array(labels), "images": images}


def load_folder(path, split: str, image_shape=None, resizing: Resizing | None = None) -> Dataset:
    """Loads image files that lie in class folders.

    The layout is `PATH/<split>/<class>/...` or `PATH/<class>/...`; images in folders further inside belong to the
    class. Folders in PATH are splits where one that holds folders of images has a usual name (train, test, val, ...) or
    the asked one; else they are classes. Files are of the kinds that the decoder reads, by their suffix
    (`jaxtransfer.data.images.SUFFIXES`); hidden ones, and what macOS and Windows leave behind, are not looked at, and
    what else is left out is counted in a warning of the logger "jaxtransfer". Links are followed.

    Classes are the folder names of all splits in plain order, so "10" comes before "2". Without split folders there
    are the splits "all", "train" and "test": in each class the fifth of the files with the smallest hash of the name
    (below the class folder) is "test", the rest "train". Examples are ordered by the hash of class and name, so that a
    slice such as "train[:100]" or "train[:10%]" mixes the classes. Images are turned as their EXIF orientation says.

    Args:
      path: the folder.
      split: a split, with an optional slice in numbers or percent.
      image_shape: (H, W, C) to which images are resized; by default the shape of the first image, and images
        of other shapes are an error when read.
      resizing: how; None stretches them.

    Returns:
      The data set; images are RGB unless `image_shape` says 1 channel, or 4 for the alpha channel too.

    Raises:
      InputError: for a missing or empty folder, a class folder without images, a name of a class that is no UTF-8, an
        unknown split or a first image that does not decode.
    """
    root = expanded(path)
    try:
        there = root.is_dir()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise InputError(f"there is no folder {images.shown(root)}; expected {LAYOUT}")
    name, start, stop = parse_split(split)
    splits, class_names = _splits(root, name)
    if name not in splits:
        raise unknown(f"split of folder:{images.shown(path)}", name, splits)
    pairs = [(image.path, label) for image, label in _ordered(splits[name], class_names)]
    pairs = pairs[bound(start, len(pairs), 0) : bound(stop, len(pairs), len(pairs))]
    if not pairs:
        raise InputError(f"folder:{images.shown(path)} has no images in split {split!r}; expected {LAYOUT}")
    shape, channels = None, 3
    if image_shape is not None:
        shape = images.check_shape(image_shape)
        channels = 4 if shape[2] == 4 else 3
    source = FolderSource(tuple(pairs), channels)
    shape = shape or source[0]["image"].shape
    resize = image_shape is not None
    return Dataset(f"folder:{path}", split, class_names, shape, source, resize=resize, resizing=resizing)


def several_sizes(dataset: Dataset) -> bool:
    """Whether images of a folder have other sizes than its first one; some of them, spread over it, are looked at.

    Args:
      dataset: what `load_folder` gave without a shape.
    """
    source, rows = dataset.origin
    if not isinstance(source, FolderSource):
        return False
    rows = np.arange(len(source)) if rows is None else rows
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), _LOOKED_AT)).round().astype(int)]
    return any(source[int(row)]["image"].shape[:2] != dataset.image_shape[:2] for row in some)


def _splits(root: Path, asked: str):
    """The images of each split as (image, label) pairs, and the class names; warns of what is left out."""
    found = find_images(root, asked)
    names = tuple(sorted({name for classes in found.splits.values() for name in classes}))
    if not any(files for classes in found.splits.values() for files in classes.values()):
        raise InputError(f"no images in {images.shown(root)}; expected {LAYOUT}")
    folders = found.splits.get(asked, {}) if "" not in found.splits else found.splits[""]
    for name in names:
        everywhere = [classes[name] for classes in found.splits.values() if name in classes]
        if not any(everywhere) or not folders.get(name, everywhere):
            where = f"the split {asked!r} of " if name in folders and any(everywhere) else ""
            raise InputError(
                f"the class {name!r} has no images in {where}{images.shown(root)}; remove its folder, or bring its "
                f"files to one of the kinds that are read: {', '.join(suffix[1:] for suffix in images.SUFFIXES)}"
            )
    label = {name: number for number, name in enumerate(names)}
    if "" not in found.splits:
        _warn(root, found.left.get(asked), asked)
        pairs = {
            split: [(image, label[name]) for name, files in classes.items() for image in files]
            for split, classes in found.splits.items()
            if classes
        }
        return pairs, names
    _warn(root, found.left[""], "")
    if found.deep:
        _LOG.warning(
            "folder:%s: %s are taken as classes, as there is no split %r; ask for one of them as the split if they are "
            "splits",
            images.shown(root),
            ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else ""),
            asked,
        )
    splits = {"all": [], "train": [], "test": []}
    for name, files in found.splits[""].items():
        pairs = [(image, label[name]) for image in sorted(files, key=lambda image: _hash(image.name))]
        splits["all"] += pairs
        splits["test"] += pairs[: len(pairs) // 5]
        splits["train"] += pairs[len(pairs) // 5 :]
    return splits, names


def _ordered(pairs, class_names):
    return sorted(pairs, key=lambda pair: _hash(f"{class_names[pair[1]]}/{pair[0].name}"))


def _warn(root, left, split: str) -> None:
    if left:
        where = f"{images.shown(root)} ({split})" if split else images.shown(root)
        _LOG.warning("folder:%s: %d files are left out: %s", where, len(left), left)


def _hash(name):
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Returns the name, the start and the stop of a split, "train[10%:]" say; None where there is no such bound."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if match is None:
        raise InputError(f"cannot read the split {split!r}; expected a name with an optional slice: 'train[:10%]'")
    name, start, stop = match.groups()
    return name, start, stop


def bound(text: str | None, size: int, default: int) -> int:
    """Returns a bound of a slice of `size` examples, a number or percents."""
    if text is None:
        return default
    return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
