"""A checkpoint that several processes write together: each its parts, the first one the rest, whole or not there."""

import contextlib
import functools
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError
from jaxtransfer.runs import arrays
from jaxtransfer.runs.checkpoint_files import (
    ARRAYS,
    WRITING,
    commit,
    digests_below,
    not_saved,
    path_of,
    prepare,
    reason_of,
    remove,
)

_ERROR, _WRITTEN = "error", "digests"
_LATE = 2.0  # seconds after which a write that was called off has ended


def begin_together(directory: Path, step: int, leaves: Mapping[str, Any], meta: Mapping[str, Any]) -> Callable[[], Any]:
    """Begins a save; all processes ask for it at once.

    Each process copies its parts to its host, writes them beside the training and says in a file what their digests
    are; when all have, the first one adds what is whole, and the checkpoint appears under its name by one rename. They
    meet by JAX's own service and not by a program of the devices, which the training runs meanwhile.

    Args:
      directory: of the checkpoints, one for all processes.
      step: of the state.
      leaves: what `arrays.copied` gave, by path.
      meta: what is noted beside them.

    Returns:
      What waits, in another thread, until the checkpoint is there; it raises where it can't be, in all processes.

    Raises:
      InputError: where it can't begin.
    """
    temporary = directory / f"{WRITING}{step}"

    def prepared() -> str:
        try:
            prepare(temporary)
            (temporary / ARRAYS).mkdir()
        except OSError as error:
            raise InputError(not_saved(step, directory, reason_of(error))) from error
        return secrets.token_hex(8)

    meet = arrays.meeting(processes.first_tells(prepared))
    own: list[arrays.Writing] = []
    begun: Callable[[], None]
    try:
        processes.agreed(lambda: own.append(arrays.begin(temporary / ARRAYS, leaves)))
        begun = own[0].wait
    except Exception as error:  # here or elsewhere: the others' parts would wait for that one's
        for writing in own:
            writing.cancel()
        begun = functools.partial(_raise, error)
    return lambda: _finish(directory, step, begun, {"step": step, **meta}, meet)


def _raise(error: Exception) -> None:
    raise error


def _finish(
    directory: Path, step: int, begun: Callable[[], None], meta: Mapping[str, Any], meet: Callable[[str], None]
) -> None:
    temporary, failed = directory / f"{WRITING}{step}", directory / f"{WRITING}failed-{step}"
    own, problem = jax.process_index(), None
    try:
        begun()
        said = {_WRITTEN: digests_below(temporary, f"{ARRAYS}/{arrays.own_part()}")}
    except Exception as error:
        problem = error
        said = {_ERROR: reason_of(error)}
    with contextlib.suppress(OSError):  # a full disk: a process that says nothing has failed
        _note(temporary, own).write_text(json.dumps(said))
    meet("written")
    if own == 0:
        try:
            known = _gathered(temporary)
            arrays.finish(temporary / ARRAYS)
            commit(temporary, path_of(directory, step), meta, known)
        except Exception as error:
            problem = error
            with contextlib.suppress(OSError):
                temporary.rename(failed)
    meet("done")
    lost = failed.exists()
    meet("seen")
    if own == 0:
        remove(temporary)
        remove(failed)
        if problem is not None:  # what was called off may have been writing yet
            time.sleep(_LATE)
            remove(temporary)
    meet("removed")
    if problem is not None:
        raise InputError(not_saved(step, directory, reason_of(problem))) from problem
    if lost:
        raise processes.ToldError(not_saved(step, directory, "another process could not write its part"))


def _note(temporary: Path, index: int) -> Path:
    return temporary / f"process-{index}.json"


def _gathered(temporary: Path) -> dict[str, str]:
    """Returns the digests of what all processes have written.

    Raises:
      InputError: where one of them could not.
    """
    known: dict[str, str] = {}
    for index in range(jax.process_count()):
        note = _note(temporary, index)
        try:
            said = json.loads(note.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"process {index} could not say what it wrote ({error})") from error
        if _ERROR in said:
            raise InputError(f"process {index}: {said[_ERROR]}")
        known |= said[_WRITTEN]
        note.unlink()
    return known
