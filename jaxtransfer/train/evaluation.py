"""Exact evaluation: every example counts once, sums are divided at the end."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtransfer.devices import processes
from jaxtransfer.devices.ahead import compile_ahead
from jaxtransfer.devices.in_flight import InFlight
from jaxtransfer.devices.placement import AXIS, Placement
from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError
from jaxtransfer.measures.measure import Measure, as_measures
from jaxtransfer.objective import Batch, Context, Mean, Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.view import MissingViewError, view_of
from jaxtransfer.terms import check_total
from jaxtransfer.train.arguments import check_batches, check_kind, check_objective, check_rows, check_state, lacking
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.turns import steps_of
from jaxtransfer.train.updates import updates_made

Evaluation = Callable[..., dict[str, Any]]  # of a state and batches; `stop`, as for `compile_ahead`


def eval_step(
    objective: Objective,
    *,
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
    mode: str = "jit",
    measures: Measure | Sequence[Measure] = (),
) -> Evaluation:
    """Compiles the evaluation of an objective, for many calls: `run(state, batches) -> metrics`. See `evaluate`."""
    check_objective(objective)
    several = as_measures(measures)
    more = tuple(forward for measure in several for forward in measure.forwards)
    runs = dataclasses.replace(objective, forwards=(*objective.forwards, *more)) if more else objective
    placement = Placement(mesh, mode, shard)
    axis = AXIS if mode == "pmap" else None

    def totals(state, batch, frozen):
        stored, state, (step, steps) = state
        params, state = placement.read(stored, stored), placement.read(state, stored)
        read = dict(zip(runs.frozen, placement.read(frozen, stored, frozen=True), strict=True))
        ctx = Context(step, None, read, axis, train=False, steps=steps)
        for measure in several:
            _check_views(measure, objective, batch)
        outputs, state = runs.run(params, state, batch, ctx)
        values, _, metrics = objective.summed.values(outputs, params, state, batch, ctx)
        examples = ctx.sum(_counted(batch))
        check_total(metrics)
        losses = []
        for value, (_, term) in zip(values, objective.summed.parts, strict=True):
            if term.pooled and term.name in metrics:
                count = metrics[term.name].count
            else:
                own = metrics.get(term.name)
                count = examples if own is None else jnp.where(own.count == 0, 0, examples)
            losses.append(Mean(value * count, count))
        if taken := {"loss", *metrics} & {measure.name for measure in several}:
            raise InputError(f"a measure is called {taken.pop()!r}, as a metric is; give it another name=")
        measured = {measure.name: measure.of_batch(outputs, batch, ctx) for measure in several}
        sums, rows = ({name: pair[i] for name, pair in measured.items()} for i in (0, 1))
        return (losses, metrics, sums), rows

    if mode == "pmap":
        in_axes = ((None, None, None), 0, None)  # nested: JAX 0.10 misreads a flat one for as many leaves as arguments
        compiled = jax.pmap(totals, axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=placement.devices)
    else:
        compiled = jax.jit(totals)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    ahead: list[Any] = []  # the program of the first batch

    def run(state: TrainState, batches: Iterable[Batch], stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        check_state(state)
        check_batches(batches, "evaluate")
        frozen = placement.frozen(runs.frozen, state.params)
        state, sums, in_flight = placement.state(state), None, InFlight()
        rows = Rows()
        optimizers = getattr(state, "opt_state", ())
        steps = updates_made(state.step, optimizers), steps_of(optimizers, state.step)
        for batch in batches:
            in_flight.wait()
            check_kind(batch)
            check_rows(batch)
            arguments = (state.params, state.state, steps), placement.batch(batch), frozen
            try:
                if not ahead and mode != "pmap":
                    ahead.append(compile_ahead(compiled.lower(*arguments), stop=stop))
                part, own = compiled(*arguments)
            except KeyError as error:
                raise lacking(error, runs, state.params, state.state) or error from None
            sums = part if sums is None else add(sums, part)
            in_flight.add(sums)
            rows.add(own)
        if sums is None:
            raise InputError("evaluate: expected at least one batch, got none; is the split empty?")
        losses, metrics, measured = processes.on_host(sums)
        values: dict[str, Any] = {"loss": sum(float(mean.value) for mean in losses)}
        values |= {name: float(mean.value) for name, mean in metrics.items()}
        together = rows.together()
        return values | {one.name: one.result(measured[one.name], together[one.name]) for one in several}

    return run


def _check_views(measure: Measure, objective: Objective, batch: Batch) -> None:
    """Raises where a measure reads what the batch lacks and the objective doesn't ask for."""
    for forward in measure.forwards:
        for view in forward.views if forward not in objective.forwards else ():
            try:
                view_of(batch, view)
            except MissingViewError as error:
                reads = "/".join(objective.forwards[0].view) if objective.forwards else "features"
                raise InputError(
                    f"the measure {measure.name!r} reads batch[{'/'.join(view)!r}], which the batch lacks; it has "
                    f"{', '.join(sorted(batch))}. Tell the measure what its model reads, as the objective is told: "
                    f"view={reads!r}"
                ) from error


class Rows:
    """Rows of batches that follow each other, on the host; a batch's are fetched while the next one is computed."""

    def __init__(self):
        self._held: list[Any] = []

    def add(self, rows: Any) -> None:
        """Adds the rows of a batch, on the devices, and fetches those of the batch before."""
        if self._held:
            self._held[-1] = processes.on_host(self._held[-1])
        self._held.append(rows)

    def together(self) -> Any:
        """Returns all rows, a tree of NumPy arrays."""
        return jax.tree.map(lambda *parts: np.concatenate(parts), *[processes.on_host(rows) for rows in self._held])


def _counted(batch: Batch) -> jax.Array:
    """Returns how much each example counts: by its mask, of zipped batches by those of all parts."""
    mask = mask_of(batch)
    if mask is not None:
        return mask
    if all(isinstance(part, Mapping) and jnp.ndim(part.get("mask", 0)) == 1 for part in batch.values()):
        return jnp.concatenate([_counted(part) for part in batch.values()])
    return jnp.ones(jax.tree.leaves(batch)[0].shape[:1])


def evaluate(
    objective: Objective,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
    mode: str = "jit",
    measures: Measure | Sequence[Measure] = (),
) -> dict[str, Any]:
    """Evaluates an objective in inference mode over all batches, exactly.

    A metric's total and count add up over the batches and are divided once; rows with `mask` 0 do not count, so a
    padded last batch changes nothing. So are the terms of `loss` that are (weighted) means of examples, such as
    `classification`, whatever their weights; the others are means over the batches weighted by their examples, which
    is the same for per-example means and penalties. A batch of which a term's own metric counts nothing is left out of
    that: where domains meet, one in which the shorter of two zipped sets has ended.

    Args:
      objective: what to evaluate.
      state: of which `params` and `state` are used.
      batches: an iterable of batches of one shape, such as `jt.data.eval_batches` gives.
      mesh: as for `train_step`.
      shard: as for `train_step`.
      mode: as for `train_step`.
      measures: what else to measure in the same pass and the same program, a measure of `jt.measures` or several:
        scores per class, calibration, average precision. A model that the objective runs is not run again for them.

    Returns:
      A dict of floats, and under each measure's name what it makes, such as a `jt.measures.ClassScores`.

    Raises:
      InputError: where there is no batch, and where the state lacks a model or an average that the objective runs;
        what a measure raises, where nothing counts say, or logits are not finite.
    """
    return eval_step(objective, mesh=mesh, shard=shard, mode=mode, measures=measures)(state, batches)
