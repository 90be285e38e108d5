"""Where a run goes on: what lies in its directory is compared with what is asked for, its newest whole state read."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtransfer.devices import processes
from jaxtransfer.runs import loggers
from jaxtransfer.runs.checkpoints import Checkpoints, fill
from jaxtransfer.runs.directory import note_config
from jaxtransfer.runs.table import keep_table
from jaxtransfer.runs.tokens import keep_tokenizer
from jaxtransfer.train.identity import Identity
from jaxtransfer.train.plan import Plan
from jaxtransfer.train.records import warn_of_missing
from jaxtransfer.train.state import TrainState

CUT = "evaluation cut"
"""In a checkpoint whose evaluation is still to come."""


class Resumed(NamedTuple):
    """Where a run is.

    Attributes:
      state: to go on with.
      step: batches that it has seen.
      history: the records so far.
      kept: what was noted beside the checkpoint.
    """

    state: TrainState
    step: int
    history: list[dict[str, Any]]
    kept: dict[str, Any]


def resumed(
    out: Path,
    checkpoints: Checkpoints,
    begun: TrainState,
    facts: Callable[[], dict[str, Any]],
    *,
    plan: Plan,
    evaluates: bool,
    note: dict[str, Any],
    learned: Any,
) -> Resumed:
    """Returns where the run in `out` is, and notes there what it is.

    Of several processes the first compares and writes, and the others are told; all of them read the checkpoint.

    Args:
      out: the run directory, open.
      checkpoints: in it.
      begun: the state at step 0.
      facts: gives what determines the weights.
      plan: when it logs, evaluates and saves.
      evaluates: whether it does evaluate.
      note: its configuration.
      learned: the data set that it learns from, or None.

    Raises:
      InputError: where another run lies there.
    """
    known: list[Identity] = []

    def compare() -> None:
        known.append(identity := Identity(out, facts(), plan.steps, periods=[*plan, evaluates]))
        for line in identity.compare(done=max(checkpoints.steps(), default=0)):
            warnings.warn(line, stacklevel=2)

    processes.first_does(compare)
    state, step, kept = begun, 0, {}
    if restored := checkpoints.restore(begun):
        state, step, kept = TrainState(*fill(begun, restored.leaves)), restored.step, restored.meta

    def write() -> list[dict[str, Any]]:
        history = loggers.read_jsonl(out / "metrics.jsonl", up_to=step)
        if known[0].same_periods and CUT not in kept:
            warn_of_missing(out, history, plan.noted(step, evaluates=evaluates))
        known[0].write()
        note_config(out, note)
        keep_tokenizer(out, learned)
        keep_table(out, learned)
        return history

    return Resumed(state, step, processes.first_tells(write), kept)
