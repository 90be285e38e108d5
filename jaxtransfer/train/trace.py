"""A trace of a few steps: what the host and the devices did, and when."""

from pathlib import Path

import jax

from jaxtransfer.errors import InputError

STEPS = 5


class Trace:
    """Traces `STEPS` calls of the step, but for the first ones, into a folder; or none, where there is no folder.

    Args:
      folder: TensorBoard's profile plugin, XProf and Perfetto read what is written there.
      first: the call to begin with.
    """

    def __init__(self, folder: Path | None, first: int = 2):
        self._folder, self._calls, self._first, self._running = folder, 0, first, False

    def next_call(self) -> None:
        """Says that a call of the step follows."""
        if self._folder is not None and self._calls == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._calls == self._first + STEPS:
            self.close()
        self._calls += 1

    def close(self) -> None:
        """Writes what was traced, if that wasn't done."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def folder_of(out: Path | None, *, profile: bool) -> Path | None:
    """Returns where a run's trace goes: `profile/` in its directory.

    Raises:
      InputError: for a trace without a run directory.
    """
    if profile and out is None:
        raise InputError("profile=True writes a trace into the run directory: give out=...")
    return out / "profile" if profile and out is not None else None
