"""Reading files that someone else named: never one that waits for a writer."""

import os
import stat
from pathlib import Path

from jaxtransfer.errors import InputError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the contents of a regular file.

    A named pipe would let its reader wait for ever, and a device may never end.

    Raises:
      InputError: for what is no regular file, naming what it is.
      OSError: where it cannot be opened or read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        check_regular(path, os.fstat(handle).st_mode)
    except InputError:
        os.close(handle)
        raise
    with open(handle, "rb") as file:
        return file.read()


def read_text(path: str | os.PathLike) -> str:
    """Returns the contents of a regular file of text in UTF-8; raises as `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


def expanded(path: str | os.PathLike) -> Path:
    """Returns a path with a user's folder for a leading "~" or "~name"; `InputError` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise InputError(f"there is no home folder of {user!r} for {os.fspath(path)}; write the path out") from None


def check_regular(path: str | os.PathLike, mode: int | None = None) -> None:
    """Raises `InputError` for what is there and is no regular file; links count as what they lead to.

    Args:
      path: of the file.
      mode: its mode, where it is known.
    """
    mode = Path(path).stat().st_mode if mode is None else mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_one, name in _KINDS if is_one(mode)), "no file")
        raise InputError(f"{os.fsdecode(path)} is {kind}, expected a regular file; give another path")
