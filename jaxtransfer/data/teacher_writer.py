"""Writing what a teacher gives for each example as a tfds source: whole or not at all, by one process."""

import errno
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.builders import reason_of
from jaxtransfer.data.cache_words import called
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.data.teacher_cache import (
    NOTE,
    SPLIT,
    DamagedCacheError,
    bytes_per_example,
    described,
    open_outputs,
    read_note,
)
from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded

_LOCK = ".lock"
_OURS = re.compile(r"\.array_record|\.json$")
_SHARD = 2**28  # bytes of outputs in a file


def write_outputs(directory, note: dict[str, Any], batches: Iterable[Mapping[str, np.ndarray]]) -> bool:
    """Writes a teacher's outputs, unless they are there.

    The files are written beside the folder and moved into place by one rename, so that no process sees half of them
    and one that is killed leaves none there.

    Args:
      directory: the folder of the cache; it is made.
      note: what the outputs are of, from `outputs_note`.
      batches: the outputs [b, ...] by name, batch after batch in the data set's order; not asked for when they
        are there.

    Returns:
      Whether they were written; False where the folder holds them already. A damaged folder of the same note is
      written anew.

    Raises:
      InputError: where the folder holds something else, another process is writing it, or it cannot be written.
    """
    directory = expanded(directory).absolute()
    if _is_written(directory, note):
        return False
    with _alone(directory, called(note)) as scratch:
        if _is_written(directory, note):  # by the process that held the lock before
            return False
        failed: list[Exception] = []
        try:
            built = _build(scratch, note, _noting(batches, failed))
            (built / NOTE).write_text(json.dumps(note, indent=2) + "\n")
            for file in built.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            open_outputs(built)
            if directory.exists() and any(directory.iterdir()):  # damaged: out of the way, then deleted
                directory.rename(scratch / "damaged")
            built.rename(directory)
        except Exception as error:
            if failed:  # what the batches raised is theirs
                raise failed[0] from None
            reason = full if (full := os.strerror(errno.ENOSPC)) in str(error) else reason_of(error)
            raise InputError(
                f"cannot write the {called(note)} {directory}: {reason}; nothing is left of it. Free "
                f"some space or mend the folder's rights, or choose another folder"
            ) from error
    return True


def _is_written(directory, note):
    """Whether the folder holds the finished cache of the note; raises where it holds something else."""
    if not directory.exists():
        return False
    if not directory.is_dir() or (any(directory.iterdir()) and not (directory / NOTE).exists()):
        raise InputError(f"{directory} is there and is no {called(note)}; choose another folder")
    if not any(directory.iterdir()):
        return False
    try:
        old = read_note(directory)
    except DamagedCacheError:
        if foreign := [path.name for path in directory.iterdir() if not _OURS.search(path.name)]:
            raise InputError(
                f"{directory} has a damaged {NOTE}, and files that are no part of a cache ({min(foreign)}); choose "
                "another folder"
            ) from None
        return False
    if old != note:
        changed = sorted(key for key in old.keys() | note.keys() if old.get(key) != note.get(key))
        there, now = (", ".join(f"{key} {_brief(n.get(key))}" for key in changed) for n in (old, note))
        raise InputError(
            f"{directory} holds another {called(old)} ({there} there, {now} now); choose another folder or remove it"
        )
    try:
        open_outputs(directory).verify()
    except DamagedCacheError:
        return False
    return True


def _brief(value):
    """A value of a note in a message: of a digest the beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


@contextmanager
def _alone(directory, what: str) -> Iterator[Path]:
    """An empty folder beside the directory that is this process's alone and gone afterwards."""
    scratch = directory.with_name(f".{directory.name}.writing")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        lock = (scratch / _LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"cannot write the {what} {directory}: {error.strerror or error}; choose another folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is writing the {what} {directory}; wait for it or choose another folder"
            ) from None
        for left in scratch.iterdir():  # what a killed process left
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _build(scratch, note, batches) -> Path:
    """Writes the records as they come, a shard after the other; tfds' own preparing would hold them all first."""
    folder = scratch / "cache"
    folder.mkdir()
    with quiet_tfds() as tfds:
        from tensorflow_datasets.core.dataset_info import DatasetIdentity

        tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.BYTES)
        outputs: dict[str, Any] = {
            name: tensor(shape=o["shape"], dtype=np.dtype(o["dtype"])) for name, o in note["outputs"].items()
        }
        info = tfds.core.DatasetInfo(
            builder=DatasetIdentity("teacher_outputs", tfds.core.Version("1.0.0"), str(folder), __name__),
            description=f"A teacher's outputs on {described(note)}.",
            features=tfds.features.FeaturesDict({"example": np.int64, **outputs}),
            disable_shuffling=True,
        )
        per_shard = max(1, _SHARD // bytes_per_example(note))
        writer = tfds.core.SequentialWriter(info, per_shard, file_format="array_record")
        writer.initialize_splits([SPLIT])
        number = 0
        for batch in batches:
            rows = range(len(next(iter(batch.values()))))
            examples = [{"example": number + row, **{name: batch[name][row, ...] for name in outputs}} for row in rows]
            writer.add_examples({SPLIT: examples})
            number += len(rows)
        writer.close_all()
    return folder


def _noting(batches, failed):
    """The batches; what they raise is noted, to be told from what the writing raises."""
    try:
        yield from batches
    except Exception as error:
        failed.append(error)
        raise
