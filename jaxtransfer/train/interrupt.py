"""Stopping between two steps: a signal is noticed, the step finished and saved, and only then the run ends."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtransfer.devices import processes
from jaxtransfer.devices.ahead import CompilationCut
from jaxtransfer.devices.votes import Votes

_LOG = logging.getLogger("jaxtransfer")
_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that has saved where it is."""


class Terminated(SystemExit):
    """SIGTERM, by which schedulers announce that they take the machine away, in a run that has saved where it is.

    Nobody need catch it: the process ends with exit code 143, as it would without a run.
    """

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class EvaluationCut(Exception):
    """An evaluation that was not waited for."""


class Signals:
    """The first signal that came, or None.

    Attributes:
      seen: its number.
      compiling: whether a program is being compiled, which is not waited for.
    """

    def __init__(self):
        self.seen: int | None = None
        self.compiling = False
        self._votes: Votes | None = None
        self._stop = 0

    def stops(self) -> bool:
        """Whether the run ends here, by a signal; asked once a step. Several processes agree on the step.

        Whichever of them it came to, all see it two steps later: the question travels beside the steps, and nothing
        waits for the answer.
        """
        if processes.count() == 1:
            self._stop = self.seen or 0
        else:
            self._votes = self._votes or Votes()
            self._stop = self._votes.agreed(self.seen or 0)
        return bool(self._stop)

    @property
    def stopped(self) -> bool:
        """Whether the run has ended by a signal, also by one that came in its last step."""
        if processes.count() == 1:
            self._stop = self.seen or 0
        return bool(self._stop)

    @contextmanager
    def cut_compilation(self) -> Iterator[Callable[[], bool]]:
        """Tells, while a program is compiled, whether a signal came: for `compile_ahead(stop=)`."""
        self.compiling = True
        try:
            yield lambda: self.seen is not None
        finally:
            self.compiling = False

    def cuts(self) -> bool:
        """Whether an evaluation is left at once: by a signal, in one process.

        Several finish it and stop then, since the signal may have come to one of them, for which the others would wait.
        """
        return self.seen is not None and processes.count() == 1

    def until_seen(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches as long as no signal came.

        Raises:
          EvaluationCut: at the first batch after one.
        """
        for batch in batches:
            if self.cuts():
                raise EvaluationCut
            yield batch

    def end(self, step: int, out: Path) -> None:
        """Ends the run by what the signal stands for, once `step` is saved.

        Raises:
          Interrupted: after SIGINT.
          Terminated: after SIGTERM.
        """
        self._end(self._stop, f"after step {step}, which is saved in {out}; the same call goes on from there")

    def end_compilation(self, start: int) -> None:
        """Ends the run likewise, before any step was made from `start` on."""
        again = f"goes on from step {start}" if start else "starts it again"
        self._end(self.seen or 0, f"while the program was compiled; the same call {again}")

    def _end(self, number: int, where: str) -> None:
        message = f"stopped by {signal.Signals(number).name} {where}"
        raise Interrupted(message) if number == signal.SIGINT else Terminated(message)


@contextmanager
def noticed(*, active: bool) -> Iterator[Signals]:
    """Notices SIGINT and SIGTERM in place of what they do by default, and says so; the second one does it at once.

    Handlers of somebody else, signals that are ignored (under nohup), and other threads than the main one, which
    can't handle any, stay as they are. So does everything afterwards.

    Args:
      active: whether to do anything at all.
    """
    signals, replaced = Signals(), {}
    told = threading.Event()

    def tell(number: int) -> None:
        if not signals.compiling and not told.is_set():  # in this order: the handler sets them in the other one
            told.set()
            name = signal.Signals(number).name
            _LOG.warning("%s: the step under way is finished and saved first; once more ends it at once", name)

    def notice(number: int, frame: Any) -> None:
        signals.seen = number
        restore()
        if not ears:
            with contextlib.suppress(RuntimeError):  # it came while the same stream was being written
                tell(number)
        elif len(ears.heard) > 1:  # while a long step kept the main thread from handling the first
            signal.raise_signal(ears.heard[-1])
        if signals.compiling:
            told.set()
            raise CompilationCut  # tracing a large network takes a while, too

    def restore() -> None:
        for number, handler in replaced.items():
            if signal.getsignal(number) is notice:
                signal.signal(number, handler)

    with contextlib.ExitStack() as stack:
        ears, free = None, []
        if active and threading.current_thread() is threading.main_thread():
            free = [number for number, usual in _DEFAULTS.items() if signal.getsignal(number) == usual]
        if free:
            ears = stack.enter_context(_listening(free, tell))
            stack.callback(restore)
            stack.enter_context(_in_forked(restore))
            replaced |= {number: signal.signal(number, notice) for number in free}
        yield signals


_UNDONE: list[Callable[[], None]] = []  # by processes that are forked from this one, which have signals of their own


@contextmanager
def _in_forked(undo: Callable[[], None]) -> Iterator[None]:
    """Calls `undo` in each process that is forked meanwhile, of workers that load data say.

    Ctrl-C reaches all of them: each would write to the pipe here, as a signal more; and a pool could not end its own.
    """
    _UNDONE.append(undo)
    try:
        yield
    finally:
        _UNDONE.remove(undo)


def _undo_here() -> None:
    for undo in _UNDONE:
        signal.set_wakeup_fd(-1)
        undo()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_undo_here)


class _Ears:
    """What arrived at a pipe of signals, their numbers in order."""

    def __init__(self):
        self.heard: list[int] = []


@contextmanager
def _listening(numbers: Sequence[int], tell: Callable[[int], None]) -> Iterator[_Ears | None]:
    """Calls `tell` of each of the signals as it comes, on a thread: handlers have to wait for a compiled step to end.

    Python writes the number of a signal to a pipe in the signal's own handler, which is safe there. Nothing is done,
    and None given, where somebody else (an event loop) has signals written to a pipe already.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.close(writing)
        os.close(reading)
        yield None
        return
    ears = _Ears()

    def listen() -> None:
        while came := os.read(reading, 64):  # ends when the other end is closed
            for number in filter(numbers.__contains__, came):
                ears.heard.append(number)
                tell(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield ears
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writing)
        thread.join()
        os.close(reading)
