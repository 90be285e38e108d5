"""Exact evaluation: every example counts once, sums are divided at the end."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtransfer.devices.in_flight import InFlight
from jaxtransfer.devices.placement import AXIS, Placement
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Context, Mean, Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.train.arguments import check_batches, check_kind, check_objective, check_rows, check_state, lacking
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.turns import steps_of
from jaxtransfer.train.updates import updates_made

Evaluation = Callable[[TrainState, Iterable[Batch]], dict[str, float]]


def eval_step(objective: Objective, *, mesh: Mesh | None = None, mode: str = "jit") -> Evaluation:
    """Compiles the evaluation of an objective, for many calls: `run(state, batches) -> metrics`. See `evaluate`."""
    check_objective(objective)
    placement = Placement(mesh, mode)
    axis = AXIS if mode == "pmap" else None

    def totals(state, batch, frozen):
        params, state, (step, steps) = state
        read = dict(zip(objective.frozen, frozen, strict=True))
        ctx = Context(step, None, read, axis, train=False, steps=steps)
        outputs, state = objective.run(params, state, batch, ctx)
        values, _, metrics = objective.summed.values(outputs, params, state, batch, ctx)
        examples = ctx.sum(_counted(batch))
        others, losses = [], []
        for value, (_, term) in zip(values, objective.summed.parts, strict=True):
            if term.pooled and term.name in metrics:
                count = metrics[term.name].count
                losses.append(Mean(value * count, count))
            else:
                others.append(value)
        if others:
            losses.append(Mean(sum(others[1:], start=others[0]) * examples, examples))
        return losses, metrics

    if mode == "pmap":
        in_axes = ((None, None, None), 0, None)  # nested: JAX 0.10 misreads a flat one for as many leaves as arguments
        compiled = jax.pmap(totals, axis_name=AXIS, in_axes=in_axes, out_axes=None, devices=placement.devices)
    else:
        compiled = jax.jit(totals)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def run(state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
        check_state(state)
        check_batches(batches, "evaluate")
        frozen = placement.frozen(objective.frozen)
        state, sums, in_flight = placement.whole(state, "state"), None, InFlight()
        optimizers = getattr(state, "opt_state", ())
        steps = updates_made(state.step, optimizers), steps_of(optimizers, state.step)
        for batch in batches:
            in_flight.wait()
            check_kind(batch)
            check_rows(batch)
            try:
                part = compiled((state.params, state.state, steps), placement.batch(batch), frozen)
            except KeyError as error:
                raise lacking(error, objective, state.params, state.state) or error from None
            sums = part if sums is None else add(sums, part)
            in_flight.add(sums)
        if sums is None:
            raise InputError("evaluate: expected at least one batch, got none; is the split empty?")
        losses, metrics = jax.device_get(sums)
        values = {"loss": sum(float(mean.value) for mean in losses)}
        return values | {name: float(mean.value) for name, mean in metrics.items()}

    return run


def _counted(batch: Batch) -> jax.Array:
    """Returns how much each example counts: by its mask, of zipped batches by those of all parts."""
    mask = mask_of(batch)
    if mask is not None:
        return mask
    if all(isinstance(part, Mapping) and jnp.ndim(part.get("mask", 0)) == 1 for part in batch.values()):
        return jnp.concatenate([_counted(part) for part in batch.values()])
    return jnp.ones(jax.tree.leaves(batch)[0].shape[:1])


def evaluate(
    objective: Objective, state: TrainState, batches: Iterable[Batch], *, mesh: Mesh | None = None, mode: str = "jit"
) -> dict[str, float]:
    """Evaluates an objective in inference mode over all batches, exactly.

    A metric's total and count add up over the batches and are divided once; rows with `mask` 0 do not count, so a
    padded last batch changes nothing. So are the terms of `loss` that are (weighted) means of examples, such as
    `classification`, whatever their weights; the others are means over the batches weighted by their examples, which
    is the same for per-example means and penalties.

    Args:
      objective: what to evaluate.
      state: of which `params` and `state` are used.
      batches: an iterable of batches of one shape, such as `jt.data.eval_batches` gives.
      mesh: as for `train_step`.
      mode: as for `train_step`.

    Returns:
      A dict of floats.

    Raises:
      InputError: where there is no batch, and where the state lacks a model or an average that the objective runs.
    """
    return eval_step(objective, mesh=mesh, mode=mode)(state, batches)
