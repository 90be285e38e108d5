"""SWAD: the mean of the weights after every single update of an interval, which validation losses choose."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.schedules import weight_averaging
from jaxtransfer.weights import Average, ema


def dense_average(model: Model, *, start: int, end: int | None = None, name: str = "") -> Average:
    """Returns the model with the plain mean of its weights after the updates start, start + 1, …, end.

    (Cha et al. 2021, arXiv:2102.08604.) Dense: every update counts, not one of each epoch. Before `start` the average
    is the model itself (that of `jt.schedules.weight_averaging` waits), after `end` it stays. It is kept in the model
    state, so that a run resumes with it:

        average = jt.adaptation.dense_average(model, start=500)
        objective = jt.adaptation.group_dro(erm) + jt.averaged(average)
        fitted = jt.fit(objective, ..., eval_objective=jt.classification(average))

    It takes each update in at the start of the next step, so that at the end of a run it lacks the last one. Running
    statistics are averaged likewise; `jt.recompute_statistics` gives those that belong to the average.

    Args:
      model: what trains in another term.
      start: the number of updates after which the first weights are taken, at least 1.
      end: the number of updates after which the last ones are; to the end of the run by default.
      name: of the average in the state; by default the model's with `_dense`.

    Returns:
      An average, as `jt.ema` gives: for `jt.averaged`, `jt.classification`, `jt.frozen`.

    Raises:
      InputError: for an interval that is none.
    """
    if start < 1 or (end is not None and end < start):
        raise InputError(f"an interval of updates has 1 <= start <= end; got start={start}, end={end}")

    within = weight_averaging(start)

    def decay(step: Any) -> Any:
        share = jnp.where(jnp.asarray(step) < start, 0.0, within(step))
        return share if end is None else jnp.where(jnp.asarray(step) > end, 1.0, share)

    return ema(model, decay, name=name or f"{model.name}_dense")


def swad_interval(
    losses: Sequence[float], *, converge: int = 3, tolerance: int = 6, ratio: float = 1.3
) -> tuple[int, int]:
    """Returns the first and the last evaluation between which SWAD averages, from the validation losses of a run.

    (Cha et al. 2021, arXiv:2102.08604, algorithm 1.) Training has converged where a loss is the smallest of itself and
    the next `converge` − 1: there the interval starts, and `ratio` times the mean of these losses is the threshold. It
    ends before `tolerance` losses in a row are all above the threshold: overfitting. What a run keeps as it goes,
    `[record["eval/loss"] for record in fitted.history if "eval/loss" in record]`, tells by which of its evaluations
    weights are to be averaged: a second run, of the same bits, with `dense_average(model, start=..., end=...)`.

    Args:
      losses: of the held-out parts of the source domains, in the order of the run; at least one.
      converge: N_s.
      tolerance: N_e.
      ratio: r; the released code has 1 + 0.3.

    Returns:
      The numbers of the first and the last evaluation, from 0, both within the interval. Without convergence the last
      one alone.

    Raises:
      InputError: for no losses or such as are not finite, counts below one, and a ratio that isn't positive.
    """
    values = np.asarray(losses, np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
        raise InputError(f"losses are one finite number for each evaluation, at least one; got {losses!r:.80}")
    if converge < 1 or tolerance < 1 or not 0 < ratio < float("inf"):
        raise InputError(
            f"needs converge >= 1, tolerance >= 1 and a positive ratio; got {converge}, {tolerance} and {ratio}"
        )
    last, start = len(values) - 1, _converged(values, converge)
    if start is None:
        return last, last
    threshold = ratio * np.mean(values[start : start + converge])
    for now in range(max(start + converge, tolerance - 1), len(values)):
        if np.min(values[now - tolerance + 1 : now + 1]) > threshold:
            return start, max(now - tolerance, start)
    return start, last


def _converged(values: np.ndarray, converge: int) -> int | None:
    """Returns the number of the first loss that is the smallest of itself and those that follow it, or None."""
    for start in range(len(values) - converge + 1):
        if np.argmin(values[start : start + converge]) == 0:
            return start
    return None
