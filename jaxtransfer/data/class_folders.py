"""Which files of a folder are images of which class and split."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtransfer.data.images import SUFFIXES, shown
from jaxtransfer.errors import InputError

LAYOUT = "PATH/<split>/<class>/*.png or PATH/<class>/*.png (also " + ", ".join(s[1:] for s in SUFFIXES[1:]) + ")"
USUAL_SPLITS = frozenset("train training test testing val valid validation dev eval evaluation".split())  # noqa: SIM905
_NO_DATA = {"thumbs.db", "desktop.ini", "__macosx"}  # what systems leave behind, as they do hidden files

Parts = tuple[str, ...]  # of a path below the folder


class Image(NamedTuple):
    """An image file of a class: its path, and its name below the class folder, "day2/3.png"."""

    name: str
    path: Path


class Found(NamedTuple):
    """What lies in a folder of class folders.

    Attributes:
      splits: by split and class the images, in no order; a class may have none. The one split "" where there are no
        split folders.
      left: by split the files that are no images of any class.
      deep: whether the folders could be splits as well, as each has folders of images and no images.
    """

    splits: dict[str, dict[str, list[Image]]]
    left: dict[str, "LeftOut"]
    deep: bool


class LeftOut:
    """Files that are left out, counted by reason."""

    def __init__(self):
        self._paths: dict[str, list[str]] = {}

    def add(self, reason: str, path: str) -> None:
        """Counts a file."""
        self._paths.setdefault(reason, []).append(path)

    def __len__(self) -> int:
        return sum(map(len, self._paths.values()))

    def __str__(self) -> str:
        reasons = Counter({reason: len(paths) for reason, paths in self._paths.items()}).most_common(4)
        parts = [f"{count} {reason} ({shown(min(self._paths[reason]))})" for reason, count in reasons]
        rest = len(self) - sum(count for _, count in reasons)
        return ", ".join(parts + ([f"{rest} others"] if rest else []))


def find_images(root: Path, split: str) -> Found:
    """Looks through a folder and all below it, following links; hidden files and folders are not looked at.

    The folders in `root` are splits where one of them has a usual name (train, test, val, ...) and folders of images
    inside; or where all images lie in folders of folders and one of these is called as the `split` that is asked for.
    Else they are classes. Images further inside belong to the class.

    Raises:
      InputError: where splits and classes lie side by side, a folder can't be read, or the name of a class is no UTF-8.
    """
    entries = list(_walk(root, (), frozenset()))
    images = [(parts, path) for parts, path, reason in entries if reason is None]
    nested = {parts[0] for parts, _ in images if len(parts) > 2}
    flat = {parts[0] for parts, _ in images if len(parts) == 2}
    named = {name for name in nested if name.lower() in USUAL_SPLITS}
    beside = {name for name in flat if name.lower() not in USUAL_SPLITS}
    if named and beside:
        raise InputError(
            f"{shown(root)} has class folders in {min(named)!r} and images in {min(beside)!r}, a split and a class "
            f"side by side; move one of them away, or rename a class that is called as a split. Expected {LAYOUT}"
        )
    depth = 1 if named or (split in nested and not flat) else 0
    found = Found({} if depth else {"": {}}, {} if depth else {"": LeftOut()}, bool(nested) and not flat)
    for parts, path, reason in entries:
        own = parts[0] if depth else ""
        classes, left = found.splits.setdefault(own, {}), found.left.setdefault(own, LeftOut())
        if reason == _FOLDER:
            if len(parts) == depth + 1:
                classes.setdefault(_utf8(parts[depth], path), [])
        elif reason is not None:
            left.add(reason, path)
        elif len(parts) < depth + 2:
            left.add("in no class folder", path)
        else:
            classes[parts[depth]].append(Image("/".join(parts[depth + 1 :]), Path(path)))
    for name in set(found.splits) - {"", split}:
        if not any(found.splits[name].values()):  # notes beside the splits, such as labels/train/1.txt
            del found.splits[name]
    return found


_FOLDER = "folder"


def _walk(folder, parts: Parts, above: frozenset) -> Iterator[tuple[Parts, str, str | None]]:
    """Yields folders and files below a folder: parts of the path, the path, and why it is no image."""
    try:
        info = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {shown(folder)}: {error.strerror}; mend its rights") from None
    if (own := (info.st_dev, info.st_ino)) in above:  # a link to a folder above
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _NO_DATA:
            continue
        inside, suffix = (*parts, entry.name), os.path.splitext(entry.name)[1].lower()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself, or into what must not be read
            is_folder, is_file = False, False
        if is_folder:
            yield inside, entry.path, _FOLDER
            yield from _walk(entry.path, inside, above | {own})
        elif suffix not in SUFFIXES:
            yield inside, entry.path, f"with {shown(suffix)}" if suffix else "without a suffix"
        else:
            yield inside, entry.path, None if is_file else "that are no files"


def _utf8(name: str, path: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the name of the class folder {shown(path)} is not UTF-8, so it can't be written to a configuration; "
            "rename it"
        ) from None
    return name
