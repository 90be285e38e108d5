"""What lies in the place of a run that was named, for the message that says so."""

from pathlib import Path

from jaxtransfer.errors import InputError
from jaxtransfer.runs.result import SUMMARY

CONFIG = "config.json"
_PROGRAM = "program.jax"


def no_run(path: Path) -> InputError:
    """Returns the error of a place that is no run, with what it is, where that can be told.

    Args:
      path: what was named.
    """
    if several := runs_of_seeds(path):
        return InputError(several)
    if path.is_file():
        return InputError(
            f"expected a run directory, and {path} is a file; of weights `jaxtransfer convert FILE --model NAME "
            f"--out RUN` makes a run"
        )
    if (path / _PROGRAM).is_file():
        return InputError(
            f"expected a run directory, and {path} is a program that was exported, which needs no jaxtransfer to be "
            f"called; name the run that it was made of"
        )
    return InputError(f"expected a run directory, with {CONFIG} in it, got {str(path)!r}; a run is what --out named")


def runs_of_seeds(path: Path) -> str:
    """Returns what to say of a folder that `--seeds` wrote, which holds a run of each seed; "" of any other.

    Args:
      path: of the folder.
    """
    found = [one for one in path.glob("seed-*") if (one / CONFIG).is_file()] if (path / SUMMARY).is_file() else []
    found.sort(key=lambda one: (len(one.name), one.name))
    if not found:
        return ""
    names = [found[0].as_posix(), *(one.name for one in found[1:8])]
    return f"{path} holds runs of several seeds: {', '.join(names)}{', ...' * (len(found) > 8)}; name one"
