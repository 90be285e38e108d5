"""Data sets of image files in class folders."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxtransfer.data import images
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.fingerprint import of_array, of_files
from jaxtransfer.errors import InputError, unknown

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
_LAYOUT = "PATH/<split>/<class>/*.png or PATH/<class>/*.png (also jpg, jpeg, bmp, webp)"


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Examples from image files: `files` are (path, label) pairs."""

    files: tuple[tuple[Path, int], ...]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return {"image": images.read(path), "label": label}

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


def load_folder(path, split: str, image_shape=None) -> Dataset:
    """Loads image files that lie in class folders.

    The layout is `PATH/<split>/<class>/*` or `PATH/<class>/*`; files are png, jpg, jpeg, bmp or webp and
    hidden ones are left out. Classes are the folder names of all splits, sorted. Without split folders there
    are the splits "all", "train" and "test": in each class the fifth of the files with the smallest hash of
    the file name is "test", the rest "train". Examples are ordered by the hash of class and file name, so
    that a slice such as "train[:100]" or "train[:10%]" mixes the classes.

    Args:
      path: the folder.
      split: a split, with an optional slice in numbers or percent.
      image_shape: (H, W, C) to which images are resized; by default the shape of the first image, and images
        of other shapes are an error when read.

    Returns:
      The data set; images are RGB unless `image_shape` says 1 channel.

    Raises:
      InputError: for a missing or empty folder, an unknown split or a first image that does not decode.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; expected {_LAYOUT}")
    splits, class_names = _scan(root)
    name, start, stop = _parse(split)
    if name not in splits:
        raise unknown(f"split of folder:{path}", name, splits)
    pairs = sorted(splits[name], key=lambda pair: _hash(f"{class_names[pair[1]]}/{pair[0].name}"))
    pairs = pairs[_bound(start, len(pairs), 0) : _bound(stop, len(pairs), len(pairs))]
    if not pairs:
        raise InputError(f"folder:{path} has no images in split {split!r}; expected {_LAYOUT}")
    shape = images.check_shape(image_shape) if image_shape is not None else images.read(pairs[0][0]).shape
    source = FolderSource(tuple(pairs))
    return Dataset(f"folder:{path}", split, class_names, shape, source, resize=image_shape is not None)


def _scan(root):
    """The files of each split as (path, label) pairs, and the class names."""
    nested = {child.name: _classes(child) for child in _folders(root)}
    if any(files for classes in nested.values() for files in classes.values()):
        names = tuple(sorted({name for classes in nested.values() for name in classes}))
        label = {name: number for number, name in enumerate(names)}
        splits = {
            split: [(path, label[name]) for name, files in classes.items() for path in files]
            for split, classes in nested.items()
        }
        return splits, names
    classes = _classes(root)
    if not any(classes.values()):
        raise InputError(f"no images in {root}; expected {_LAYOUT}")
    splits = {"all": [], "train": [], "test": []}
    for label, name in enumerate(sorted(classes)):
        pairs = [(path, label) for path in sorted(classes[name], key=lambda path: _hash(path.name))]
        splits["all"] += pairs
        splits["test"] += pairs[: len(pairs) // 5]
        splits["train"] += pairs[len(pairs) // 5 :]
    return splits, tuple(sorted(classes))


def _folders(root):
    return sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(root):
    return {child.name: _files(child) for child in _folders(root)}


def _files(folder):
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _hash(name):
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _parse(split):
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if match is None:
        raise InputError(f"cannot read the split {split!r}; expected a name with an optional slice: 'train[:10%]'")
    return match.groups()


def _bound(text, size, default):
    if text is None:
        return default
    return round(int(text[:-1]) * size / 100) if text.endswith("%") else int(text)
