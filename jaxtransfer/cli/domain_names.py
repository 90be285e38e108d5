"""A domain as the command line names it: a folder or a data set, and which splits of it."""

from pathlib import Path
from typing import NamedTuple

from jaxtransfer.data.unlabelled import lies_flat
from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded

FOLDER = "folder:"


class Part(NamedTuple):
    """A domain as the command line names it.

    Attributes:
      name: of the data set.
      train: the split to train on.
      test: the one to test on; None where that is to be found.
      asked: whether the split to test on was asked for.
    """

    name: str
    train: str
    test: str | None
    asked: bool

    @property
    def place(self) -> str:
        """Where it lies, the same however its folder is written; the name of a data set otherwise."""
        path = self.name.removeprefix(FOLDER)
        return self.name if path == self.name else FOLDER + str(expanded(path).resolve())

    @property
    def flat(self) -> bool:
        """Whether it is a folder of images in no class folders."""
        path = self.name.removeprefix(FOLDER)
        return path != self.name and lies_flat(path)


def part_of(word: str, train: str, test: str | None) -> Part:
    """Returns what NAME, or NAME@SPLIT, stands for."""
    name, at, split = word.rpartition("@")
    path = word.removeprefix(FOLDER)
    if not at or "/" in split or (path != word and Path(expanded(path)).exists()):
        return Part(word, train, test or "test", test is not None)
    if not name or not split:
        raise InputError(f"expected NAME, or NAME@SPLIT; got {word!r}")
    return Part(name, split, test, test is not None)
