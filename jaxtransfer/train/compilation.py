"""What a run tells of its compilation, and how a signal ends it."""

import logging
import time
from collections.abc import Callable
from typing import Any

from jaxtransfer.devices.ahead import CompilationCut, Cost
from jaxtransfer.errors import InputError
from jaxtransfer.train.interrupt import EvaluationCut, Signals
from jaxtransfer.train.state import TrainState

_LOG = logging.getLogger("jaxtransfer")
_FIRST, _EVERY = 10, 30  # seconds


def compiled_step(
    source: Any, state: TrainState, size: int, start: int, signals: Signals, bar: Callable[[int, str], None]
) -> Cost | None:
    """Compiles the first call of a run, and tells how long it takes; a signal ends the run there and then.

    Args:
      source: of the batches, `FromHost` or `DrawnInside`.
      state: that the run starts from.
      size: steps of the call.
      start: the step that the run starts from.
      signals: that came.
      bar: the progress bar's `update(step, text)`.

    Returns:
      What the call costs, None where that isn't known.
    """
    begin, due = time.perf_counter(), float(_FIRST)

    def told(seconds: float) -> None:
        nonlocal due
        bar(start, f"compiling, {seconds:.0f} s")
        if seconds >= due:
            due = seconds + _EVERY
            _LOG.info("compiling the step, %.0f s so far", seconds)

    try:
        with signals.cut_compilation() as stop:
            cost = source.compile(state, size, stop=stop, told=told)
    except CompilationCut:
        signals.end_compilation(start)
        raise
    if due > _FIRST:
        _LOG.info("compiled the step in %.0f s", time.perf_counter() - begin)
    return cost


def cut_evaluation(evaluate: Callable, state: TrainState, batches: Any, signals: Signals) -> Any:
    """Returns `evaluate(state, batches)`, which a signal cuts off between two batches or while it is compiled.

    Raises:
      EvaluationCut: where a signal came.
    """
    try:
        return evaluate(state, signals.until_seen(batches), signals.cuts)
    except CompilationCut:
        raise EvaluationCut from None


def told_of(cost: Cost | None) -> dict[str, float]:
    """Returns a cost as numbers by name.

    Raises:
      InputError: where it isn't known.
    """
    if cost is None:
        raise InputError("dry_run=True reads the compiled program, which pmap doesn't tell: choose mode='jit'")
    names = ("flops_per_step", "argument_bytes", "output_bytes", "temporary_bytes", "program_bytes")
    return {name: float(value) for name, value in zip(names, cost, strict=True) if value is not None}
