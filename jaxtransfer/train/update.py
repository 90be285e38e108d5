"""One update: a gradient, and what an optimiser makes of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.devices.placement import Placement
from jaxtransfer.loss_scale import chosen, scale_of, told_of_scale
from jaxtransfer.objective import Batch, Context, named_key
from jaxtransfer.optim import held_still
from jaxtransfer.parts.extra_arguments import GRAD_FN, taking, update_by
from jaxtransfer.terms import check_total
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.turns import Turn, kept_by, moved_by
from jaxtransfer.train.updates import accumulates, per_update, updates_made
from jaxtransfer.train.watch import watched


def update_of(turn: Turn, axis: str | None, placement: Placement, *, watch: bool) -> Callable:
    """Returns `update(state, batch, frozen, number, later) -> (state, values)`: of a turn, its step not counted.

    `number` is that of the repetition; `later` is true where another update of the step came before.

    Args:
      turn: what is lowered, and how.
      axis: of the devices, under `pmap`.
      placement: of what the update reads and gives.
      watch: as for `train_step`.
    """
    objective = turn.objective
    optimizer = taking(turn.optimizer)

    def update(state: TrainState, batch: Batch, read: dict[Any, Any], number: int, later: bool):
        own, opt_state = moved_by(turn, state.opt_state, state.params)
        scale = scale_of(opt_state)
        slow, made = accumulates(opt_state), updates_made(state.step, opt_state)
        key = jax.random.fold_in(state.key, state.step) if slow else state.key  # else batches of an update draw alike
        if turn.name:
            key = named_key(key, f"{turn.name}/{number}")
        ctx = Context(made, key, read, axis, still=held_still(opt_state, own), later=later and not slow)

        def loss_fn(own):
            params = own if turn.name == "" else {**state.params, **own}
            params = placement.read(params, state.params)
            loss, new_state, metrics = objective(params, placement.read(state.state, state.params), batch, ctx)
            return loss, (new_state, metrics)

        def scaled(own):
            loss, told = loss_fn(own)
            return loss if scale is None else loss * scale, (loss, *told)

        (_, (loss, new_state, metrics)), grads = jax.value_and_grad(scaled, has_aux=True)(own)
        if scale is not None:
            grads = jax.tree.map(lambda leaf: (leaf / scale).astype(leaf.dtype), grads)
        if axis is not None:  # the loss is global on each device, so the mean of its gradients is the gradient
            grads = jax.lax.pmean(grads, axis)
        grads = placement.stored(grads, state.params)
        value_fn = _global(lambda own: loss_fn(own)[0], axis)
        known: dict[str, Any] = {"value": loss, "grad": grads, "value_fn": value_fn}
        if scale is None:  # else it would overflow unseen
            known[GRAD_FN] = lambda own, *_: placement.stored(jax.grad(value_fn)(own), state.params)
        updates, opt_state = update_by(optimizer, grads, opt_state, own, known)
        own: Any = optax.apply_updates(own, updates)
        after: Any = opt_state
        if slow:
            updated = updates_made(state.step, opt_state) != made
            new_state = per_update(objective.per_update, state.state, new_state, updated)
        if scale is not None:
            new_state = chosen(~after.overflowed, new_state, state.state)
            loss = jnp.where(after.floored, jnp.nan, loss)  # no scale helps: what stops a run
        told = watched(objective, made, grads, opt_state, turn=turn.name) if watch else {}
        check_total(metrics)
        named = {"loss": loss, **{name: metric.value for name, metric in metrics.items()}}
        values = {**told, **{f"{turn.name}/{name}" if turn.name else name: value for name, value in named.items()}}
        if scale is not None:
            values |= told_of_scale(scale, after, turn.name)
        params = own if turn.name == "" else {**state.params, **own}
        opt_state = kept_by(turn, state.opt_state, opt_state)
        return state._replace(params=params, state=new_state, opt_state=opt_state), values

    return update


def _global(loss: Callable, axis: str | None) -> Callable:
    """Returns a loss whose gradient is the global one on each device, as its value is: what a line search follows."""
    if axis is None:
        return loss

    @jax.custom_vjp
    def value(params):
        return loss(params)

    def forward(params):
        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.lax.pmean(gradient, axis)

    def backward(gradient, slope):
        return (jax.tree.map(lambda leaf: (slope * leaf).astype(leaf.dtype), gradient),)

    value.defvjp(forward, backward)
    return value
