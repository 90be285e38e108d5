"""Files of a run that a full disk or a planted link can't spoil."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxtransfer.errors import InputError


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # what a killed process of this number left, or a link: it isn't followed
    try:
        with temporary.open("x") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Appended:
    """A file that grows by whole records: what could not be written whole is taken back.

    Nothing is buffered, so a record that was written survives the process, and closing has nothing left to fail at.

    Args:
      path: of the file; created where there is none.
      new: whether a file that is already there is an error.
    """

    def __init__(self, path: Path, *, new: bool = False):
        self._file = path.open("xb" if new else "ab", buffering=0)

    def write(self, record: bytes) -> None:
        """Appends a record.

        Raises:
          OSError: where it doesn't fit on the disk; the file then ends with the record before.
        """
        whole, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(record):
                written += self._file.write(record[written:])
        except OSError:
            self._file.truncate(whole)
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Makes an error of the file system one that names the file and the remedy.

    Raises:
      InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"could not write {path}: {error.strerror or error}; the checkpoints are unharmed. Free some space or mend "
            f"the folder's rights, and run the same command again"
        ) from error
