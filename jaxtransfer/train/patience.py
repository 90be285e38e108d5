"""How long a loop waits for its data: a source that gives no batch is told, and ends the run at last."""

import contextlib
import itertools
import logging
import math
import numbers
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError, StuckDataError

_LOG = logging.getLogger("jaxtransfer")
_TIMES = 10  # the patience is over after so many times the seconds of the first warning
_WAKES = signal.SIGURG  # ignored by default, so that one which comes late does nothing
_END = object()


class _Awaited(NamedTuple):
    """A batch that is waited for: of which data, and the how manieth."""

    data: str
    number: int

    def __str__(self) -> str:
        return f"batch {self.number} of {self.data}"


class Patience:
    """Watches, while it is entered, how long each batch takes: `with patience.on("the training data", 3): next(...)`.

    After some seconds a warning says what is waited for, again after each so many, and after ten times as many the
    waiting ends by an error. A thread looks now and then; the loop itself only notes what it waits for. The error is
    raised in the main thread, by a signal that nobody else has taken (SIGURG); in another thread, and where what reads
    never comes back to Python, the warnings go on.

    Args:
      seconds: until the first warning; None or infinity waits for ever.
      resumes: whether the same call goes on where this one ends.

    Raises:
      InputError: for seconds that are not positive.
    """

    def __init__(self, seconds: float | None, *, resumes: bool = False):
        if seconds is not None and not (isinstance(seconds, numbers.Real) and seconds > 0):
            raise InputError(f"data_patience must be positive seconds, or None to wait for ever; got {seconds!r}")
        self._seconds = math.inf if seconds is None else float(seconds)
        self._resumes = resumes
        self._awaited: _Awaited | None = None
        self._over: _Awaited | None = None
        self._ended, self._wakes, self._thread = threading.Event(), False, None

    def __enter__(self) -> "Patience":
        if self._seconds < math.inf:
            in_main = threading.current_thread() is threading.main_thread()
            self._wakes = in_main and signal.getsignal(_WAKES) == signal.SIG_DFL
            if self._wakes:
                signal.signal(_WAKES, self._give_up)
            self._thread = threading.Thread(target=self._look, name="patience", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()  # so that it sends nothing afterwards
        if self._wakes:
            signal.signal(_WAKES, signal.SIG_DFL)

    @contextlib.contextmanager
    def on(self, data: str, number: int) -> Iterator[None]:
        """Watches over a block that gets batch `number`, from 1 on, of what is called `data`.

        Raises:
          StuckDataError: where it doesn't come.
        """
        self._awaited = _Awaited(data, number)
        try:
            yield
        finally:
            self._awaited = None

    def each(self, batches: Iterable[Any], data: str) -> Iterator[Any]:
        """Yields batches of what is called `data`, watching over each."""
        stream = iter(batches)
        for number in itertools.count(1):
            with self.on(data, number):
                batch = next(stream, _END)
            if batch is _END:
                return
            yield batch

    def _look(self) -> None:
        tick = min(self._seconds / 4, 1.0)
        seen, waited, told = None, 0.0, 0
        while not self._ended.wait(tick):
            awaited = self._awaited
            if awaited is None or awaited is not seen:
                seen, waited, told = awaited, 0.0, 0
                continue
            waited += tick  # and no clock: of a process that was stopped meanwhile no batch is late
            if waited >= self._seconds * _TIMES and self._wakes:
                self._over = awaited
                signal.pthread_kill(threading.main_thread().ident or 0, _WAKES)
            elif waited >= self._seconds * (told + 1):
                told = math.floor(waited / self._seconds)
                _LOG.warning("%s", self._line(awaited, waited), extra={"of_any_process": True})

    def _line(self, awaited: _Awaited, waited: float) -> str:
        who = f"process {processes.index()} of {processes.count()} waits" if processes.count() > 1 else "waiting"
        ends = f"; the run ends after {self._seconds * _TIMES:.3g} s" if self._wakes else ""
        return f"{who} for {awaited}, {waited:.3g} s so far{ends}"

    def _give_up(self, number: int, frame: Any) -> None:
        """The handler, in the main thread; does nothing where the batch came meanwhile."""
        if (awaited := self._over) is not None and awaited is self._awaited:
            again = "; the same call goes on from the last checkpoint" if self._resumes else ""
            raise StuckDataError(
                f"{awaited} did not come in {self._seconds * _TIMES:.3g} s. Look at what it is read from (a network "
                f"drive, a worker that died, a full queue){again}. Where batches take that long, raise "
                f"data_patience={self._seconds:.3g}"
            )
