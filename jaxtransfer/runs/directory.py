"""A run directory: one configuration, one process at a time."""

import fcntl
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.runs.configuration import ENTRIES, FEATURES
from jaxtransfer.runs.files import told, write_atomically
from jaxtransfer.runs.no_run import CONFIG as CONFIG
from jaxtransfer.runs.no_run import no_run
from jaxtransfer.runs.table import TABLE
from jaxtransfer.runs.tokens import TOKENIZER

MADE = "made"  # the entry of a configuration that says how its run came about, and not what it is
NOTE = "identity.json"  # what the run is, by which `fit` compares; see train/identity.py
_LOCK = ".lock"
_MADE: set[Path] = set()  # folders that this process made


def read_config(directory: str | Path) -> dict[str, Any]:
    """Returns the configuration of a run.

    Raises:
      InputError: where the directory is no run.
    """
    path = Path(directory) / CONFIG
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")  # to read a pipe would wait for ever
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"expected a JSON object, got {reprlib.repr(config)}")
        return config
    except (FileNotFoundError, NotADirectoryError):
        raise no_run(Path(directory)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the configuration {path}: {error}") from None


def steps_of(directory: str | Path, config: Mapping[str, Any]) -> int:
    """Returns how many steps a run is to make: as it noted of itself, as several phases share those of a command."""
    try:
        steps = json.loads((Path(directory) / NOTE).read_bytes())["steps"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or spoiled
        steps = config.get("steps")
    return steps if isinstance(steps, int) else 0


@contextmanager
def open_run(directory: str | Path, config: dict[str, Any]) -> Iterator[Path]:
    """Opens a run directory for training: creates it, or checks that it is of the same configuration.

    A directory in which nothing has been saved yet may be begun anew with any; what is refused before it wrote anything
    leaves none.

    Args:
      directory: where the run is or will be.
      config: what determines the run; JSON types. Another number of `steps` is left to what the run noted of itself:
        some runs can be trained on.

    Yields:
      The directory; held by this process alone, or by the first of several that train together.

    Raises:
      InputError: where the directory holds a run of another configuration or other files, or another process
        is training in it.
    """
    directory = Path(directory)
    config = _as_json(config)
    with ExitStack() as stack:
        processes.first_does(lambda: stack.enter_context(_held(directory, config)))
        yield directory


@contextmanager
def _held(directory: Path, config: dict[str, Any]) -> Iterator[None]:
    try:
        _make(directory)
        foreign = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        if foreign and not (directory / CONFIG).exists():
            raise InputError(f"{directory} is no run directory, but holds {foreign[0]!r}; choose an empty --out")
        lock = os.fdopen(os.open(directory / _LOCK, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666), "w")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write to the run directory {directory}: {reason}; choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(directory / _LOCK)):
                raise OSError("it was taken back by the process that held it")
        except OSError:
            raise InputError(
                f"another process is training in {directory}; wait for it or choose another --out"
            ) from None
        try:
            if (directory / CONFIG).exists() and _begun(directory):
                _check_same(directory, read_config(directory), config)
            else:
                (directory / CONFIG).unlink(missing_ok=True)
                note_config(directory, config)
            yield
        except InputError:
            _take_back(directory)
            raise


def _make(directory: Path) -> None:
    """Makes a folder, and those above it, and notes which weren't there."""
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    _MADE.update(folder.absolute() for folder in missing)


def _take_back(directory: Path) -> None:
    """Removes what a run that is refused leaves if it wrote nothing: its configuration, the lock, folders made for it.

    The lock is held.
    """
    if any(entry.name not in (CONFIG, _LOCK) for entry in directory.iterdir()):
        return
    for name in (CONFIG, _LOCK):
        (directory / name).unlink(missing_ok=True)
    for folder in (directory.absolute(), *directory.absolute().parents):
        if folder not in _MADE:
            break
        with suppress(OSError):  # another process has begun something there
            folder.rmdir()
            _MADE.remove(folder)


def _begun(directory: Path) -> bool:
    """Whether anything was saved, here or by a phase of the run; what failed before that binds nobody."""
    return any(directory.rglob("checkpoints/step_*"))


def note_config(directory: Path, config: dict[str, Any]) -> None:
    """Writes the configuration of a run; how it came about stays as it was noted when the run began."""
    if MADE in config and (directory / CONFIG).exists():
        began = read_config(directory).get(MADE)
        config = {**config, MADE: config[MADE] if began is None else began}
    with told(directory / CONFIG):
        write_atomically(directory / CONFIG, json.dumps(_as_json(config), indent=2) + "\n")


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise InputError(f"config= must hold what JSON can: text, numbers, lists, dicts; {error}") from None


def _check_same(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    keys = (old.keys() | new.keys()) - {MADE}
    if "format" in new and "format" not in old:  # written before runs said what they are
        keys -= ENTRIES.keys() - old.keys() | {"format"}
    keys -= {TOKENIZER, TABLE} - old.keys()  # written before runs kept theirs
    if new.get("knows") == [LABELS] and old.get("knows") in ([CLASSES], [FEATURES]):  # before runs knew labels
        keys -= {"knows", "class_names", "outputs"}
    changes = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(keys)
        if _or_none(old.get(key)) != _or_none(new.get(key))
    ]
    if len(changes) == 1 and old.get("steps") != new.get("steps") and (directory / NOTE).exists():
        return
    if changes:
        raise InputError(
            f"{directory} holds a run of another configuration ({'; '.join(changes)}); repeat that one's command to "
            f"resume it, or choose another --out"
        )


def _or_none(value: Any) -> Any:
    """Returns None for what is off: an option that came later is off in the runs before it."""
    return None if value is False or value == [] else value
