"""What a run notes of its steps and evaluations; a value that is not finite ends it."""

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer.errors import InputError, NonFiniteLossError, unknown
from jaxtransfer.loss_scale import LOSS_SCALE, is_skip
from jaxtransfer.runs.checkpoints import Checkpoints
from jaxtransfer.train.watch import is_of_a_moment, is_watched


class Call(NamedTuple):
    """The metrics of the steps `first` to `last`, means over them."""

    first: int
    last: int
    metrics: dict[str, Any]


def finite(pending: Iterable[Call], checkpoints: Checkpoints | None) -> list[Call]:
    """Returns the calls with their metrics on the host; raises at the first that is not finite.

    It needn't be where an update was skipped, for the scale of its loss was too large.
    """
    calls = [call._replace(metrics=jax.device_get(call.metrics)) for call in pending]
    for first, last, row in calls:
        bad = [name for name, value in row.items() if not math.isfinite(value) and not is_watched(name)]
        if bad and not _skips(row):
            where = f"at step {last}" if first == last else f"within steps {first} to {last}"
            raise _not_finite(f"the loss is not finite {where}", row, bad, checkpoints)
    return calls


def _skips(row: Mapping[str, Any]) -> bool:
    """Whether all updates were skipped whose metrics these are; those of some alone are finite: see `means`."""
    return any(value >= 1 for name, value in row.items() if is_skip(name))


def as_json(calls: Iterable[Call]) -> list[Any]:
    """Returns calls whose metrics are on the host as JSON types; `Call(*entry)` is what one was."""
    return [[first, last, {name: float(value) for name, value in row.items()}] for first, last, row in calls]


def flush(pending: deque[Call], checkpoints: Checkpoints | None) -> dict[str, Any]:
    """Returns the mean of the steps' metrics since the last record; raises at the first that is not finite.

    Of learning rate and weights it is the last value; a norm of gradients that is not finite is left out.
    """
    calls = finite(pending, checkpoints)
    pending.clear()
    means = {}
    for name in calls[0].metrics:
        if not all(name in call.metrics for call in calls):
            continue  # a checkpoint of an earlier version, which watched less
        told = [call for call in calls if math.isfinite(call.metrics[name]) or not _skips(call.metrics)]
        if not told:
            continue
        values, sizes = [call.metrics[name] for call in told], [call.last - call.first + 1 for call in told]
        value = float(values[-1] if is_of_a_moment(name) else np.average(values, weights=sizes))
        if math.isfinite(value):  # an optimiser may mend a gradient that is not
            means[f"train/{name}"] = value
    return {"step": calls[-1].last, **means}


def warn_of_missing(out: Path, history: list[dict[str, Any]], expected: dict[str, set[int]]) -> None:
    """Warns where a run's history lacks records of steps that it has made."""
    there = {side: {record["step"] for record in history if f"{side}/loss" in record} for side in expected}
    if missing := sorted(step for side, steps in expected.items() for step in steps - there[side]):
        warnings.warn(
            f"{out / 'metrics.jsonl'} lacks {len(missing)} records of steps that the run has made, the first of step "
            f"{missing[0]}; the best step and the patience rest on the others",
            stacklevel=3,
        )


def evaluated(metrics: dict[str, float], number: int, monitor: str | None, checkpoints: Checkpoints | None):
    """Returns the record of an evaluation, whose loss must be finite."""
    if monitor is not None and monitor not in metrics:
        raise unknown("metric to monitor", monitor, metrics)
    if not math.isfinite(metrics["loss"]):
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        raise _not_finite(f"the loss of the evaluation is not finite after step {number}", metrics, bad, checkpoints)
    return {"step": number, **{f"eval/{name}": value for name, value in metrics.items()}}


def measured(values: Mapping[str, float], number: int, record: dict[str, Any], monitor: str | None) -> dict[str, Any]:
    """Returns the record of step `number`, an evaluation or none yet, with what was measured beside it."""
    found = {f"eval/{name}": float(value) for name, value in values.items()}
    if monitor is not None and f"eval/{monitor}" not in (known := {**record, **found}):
        raise unknown("metric to monitor", monitor, [name[5:] for name in known if name.startswith("eval/")])
    if taken := sorted(found.keys() & record.keys()):
        raise InputError(f"a measurement can't be called {taken[0][5:]!r}, as a metric of the evaluation is; rename it")
    return {"step": number, **record, **found}


def _not_finite(what: str, values: dict[str, Any], bad: list[str], checkpoints: Checkpoints | None):
    terms, last = [name for name in bad if name != "loss"] or bad, ""
    if checkpoints is not None:
        last = f"; {checkpoints.last_good()}"
    scaled = ", with the smallest scale of the loss, too" if any(name.startswith(LOSS_SCALE) for name in values) else ""
    return NonFiniteLossError(
        f"{what}{scaled}: term {', '.join(map(repr, terms))} is {float(values[terms[0]])}{last}. Lower the learning "
        f"rate or check the data"
    )


def measures_of(record: Mapping[str, Any]) -> str:
    """Returns what a record holds of training and evaluation as one line: `train/loss 0.31, eval/accuracy 0.912`."""
    found = {
        name: value
        for name, value in record.items()
        if name.startswith("eval/") or (name.startswith("train/") and not is_watched(name[6:]))
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float))
