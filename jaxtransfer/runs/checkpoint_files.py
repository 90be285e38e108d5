"""The folders of checkpoints: their names, the digest of each file, whole under their name or not there."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.errors import InputError

ARRAYS, META, DIGESTS = "state", "meta.json", "digests.json"
WRITING = ".writing-"
"""What the names of folders begin with that are no checkpoints yet, or no longer."""
_NAME = re.compile(r"step_(\d+)$")


class DamagedCheckpointError(InputError):
    """A checkpoint whose files are not what was written."""


def steps(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for entry in directory.iterdir() if (match := _NAME.match(entry.name)))


def path_of(directory: Path, step: int) -> Path:
    """Returns the folder of a checkpoint."""
    return directory / f"step_{step:09d}"


def meta_of(directory: Path, step: int) -> dict[str, Any]:
    """Returns what was noted beside a checkpoint.

    Raises:
      OSError, ValueError: where that can't be read.
    """
    return json.loads((path_of(directory, step) / META).read_text())


def prepare(temporary: Path) -> None:
    """Makes the empty folder in which a checkpoint is written."""
    refuse_link(temporary)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    temporary.mkdir()  # raises where something has come there since: what is written into is our own


def commit(temporary: Path, final: Path, meta: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Makes what was written a checkpoint: digests, all of it on disk, then its name.

    Args:
      temporary: where it was written.
      final: its name.
      meta: what is noted beside it.
      known: digests of files that are on disk already, by name.
    """
    (temporary / META).write_text(json.dumps(meta))
    rest = [file for file in files(temporary) if _name(file, temporary) not in known]
    digests = {**known, **{_name(file, temporary): digest(file) for file in rest}}
    (temporary / DIGESTS).write_text(json.dumps(digests))
    synchronise([*rest, temporary / DIGESTS])
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)


def digests_below(folder: Path, below: str) -> dict[str, str]:
    """Returns the digests of the files in a part of a folder, which are on disk then."""
    own = files(folder / below)
    synchronise(own)
    return {_name(file, folder): digest(file) for file in own}


def verified(path: Path, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Returns what was noted beside a checkpoint, whose files are as they were written.

    Args:
      path: its folder.
      share: (index, count), where several processes look at a part of the files each.

    Raises:
      OSError, ValueError: name a file that is missing, truncated or changed.
    """
    digests = json.loads((path / DIGESTS).read_text())
    written = {_name(file, path) for file in files(path)} - {DIGESTS}
    if missing := sorted(written - digests.keys()):  # an emptied list would verify nothing
        raise ValueError(f"{DIGESTS} lacks {missing[0]}")
    for name in list(digests)[share[0] :: share[1]]:
        if digest(path / name) != digests[name]:
            raise ValueError(f"{name} has changed since it was written")
    return json.loads((path / META).read_text())


def files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint; not those that desktops and network file systems leave in any folder."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".nfs", ".DS_")))


def _name(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder))


def digest(file: Path) -> str:
    """Returns the digest of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()


def synchronise(written: list[Path]) -> None:
    """Waits until files are on disk."""
    for file in written:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def refuse_link(path: Path) -> None:
    """Raises for a link, which saving would follow to files of somebody else."""
    if path.is_symlink():
        raise InputError(
            f"{path} is a link to {os.readlink(path)}; expected a folder of this run's own, since a link would be "
            f"written through. Remove it, and run the same command again"
        )


def remove(path: Path) -> None:
    """Removes a folder or a file, as far as that works; a link is left alone."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif not path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be written again; returns its new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def reason_of(error: BaseException) -> str:
    """Returns why a checkpoint was not written, in a line."""
    reason = str(error).partition(" [")[0]  # Orbax appends its whole plan
    full = os.strerror(errno.ENOSPC)
    return full if full in reason else reason


def not_saved(step: int, directory: Path, reason: str) -> str:
    """Returns the line that says so."""
    return (
        f"could not save step {step} in {directory}: {reason}; earlier checkpoints are unharmed. Free some space or "
        f"mend the folder's rights, and run the same command again"
    )
