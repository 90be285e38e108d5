"""What a run is at a moment: one pytree, from which everything that follows is determined."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtransfer import tree
from jaxtransfer.devices.parts import laid
from jaxtransfer.devices.placement import Placement, check_whole
from jaxtransfer.devices.sharding import Rule
from jaxtransfer.errors import InputError
from jaxtransfer.loss_scale import scale_of
from jaxtransfer.narrow_weights import check_stands, moves_badly
from jaxtransfer.objective import Batch, Context, Objective
from jaxtransfer.optim import Still, held_still
from jaxtransfer.parts.extra_arguments import GRAD_FN, as_told, taking, update_by
from jaxtransfer.parts.masking import check_masks
from jaxtransfer.terms import check_total, result_of
from jaxtransfer.train.arguments import check_batch, check_objective, check_optimizer, check_start, key_of
from jaxtransfer.train.turns import Turn, first_states, moved_by, turns_of

_MANY = 2**30  # updates after which an average is no longer warming up


class TrainState(NamedTuple):
    """The state of a run.

    Attributes:
      step: batches seen so far, int32 scalar: the position in the data, and the updates made, unless the optimiser
        accumulates gradients.
      key: the run's key; every draw is `fold_in(key, step)` and a name.
      params: a dict by model name of what trains.
      state: a dict by model name of what else changes (batch statistics).
      opt_state: the optimiser's.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    state: Any
    opt_state: Any

    @classmethod
    def of(cls, params: Any, state: Any = None, *, step: int = 0) -> "TrainState":
        """Returns a state to evaluate: weights and statistics by model name, no optimiser."""
        return cls(jnp.asarray(step, jnp.int32), jax.random.key(0), params, state or {}, ())


def init(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    key: jax.Array | int,
    batch: Batch,
    *,
    params: Any = None,
    state: Any = None,
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
) -> TrainState:
    """Makes the first state of a run and checks that the objective fits the batch, before anything is compiled.

    Args:
      objective: what will be trained.
      optimizer: sees the parameters that the run starts from, transferred ones included.
      key: draws the initial weights and everything after; or a seed, a whole number.
      batch: an example of the batches to come.
      params: weights to start from, for some or all models; copied, so that a run may start at its own anchor.
      state: what else to start from, for some or all entries of the state: batch statistics, queues, moving averages;
        copied. An average that isn't given starts as the model does. A model with batch statistics whose weights are
        given needs its own here; fresh ones, `model.init(key, inputs)["batch_stats"]`, are a choice to make.

      mesh: with `shard`, as for `train_step`; without, the state begins on the default device and a step places it.
      shard: as for `train_step`: what is drawn, and what the optimiser begins with, is made split, so that no device
        ever holds the whole; weights that are given go from the host, or from where they lie, into their parts.

    Returns:
      The state at step 0.

    Raises:
      InputError: where the batch lacks an entry, a model's `init` gives something else than arrays (named by path),
        labels are out of range, a mask isn't [B], finite and not negative, given weights do not fit the models or come
        without their batch statistics, a penalty does not cover the parameters, or two terms report a metric of one
        name.
    """
    check_objective(objective)
    check_optimizer(optimizer)
    check_start(params, "params")
    check_start(state, "state")
    turns = turns_of(objective, optimizer)
    drawn = key_of(key)
    _check_batch(batch)
    batch = jax.tree.map(_local, batch)
    placement = Placement(mesh, "jit", shard) if shard is not None else None
    shards = placement.shards if placement is not None else None
    fresh, fresh_state = _fresh(objective, drawn, batch, placement)
    _check_complete(params, state, fresh_state)
    params = _owned(_replaced(fresh, params, "params", split=shards is not None))
    given = state or {}
    state = _replaced(fresh_state, state, "state", split=shards is not None)
    for average in objective.averages:  # of the weights that the run starts from, which needn't be the fresh ones
        as_begun = average.init(params, state, moves=_MANY if average.name in given else 0)
        state = {**state, **{name: entry for name, entry in as_begun.items() if name not in given}}
    state = _owned(state)
    key = jnp.copy(drawn)
    opt_state = jax.eval_shape(lambda params: first_states(turns, params, key, batch), params)
    for turn in turns:
        _check_update(turn, objective, params, state, opt_state, key, batch)
        _check_told(turn, params, opt_state)
        _tell_of_narrow(turn, params, opt_state)
    if placement is None or shards is None:
        return TrainState(jnp.zeros((), jnp.int32), key, params, state, first_states(turns, params, key, batch))
    opt_state = first_states(turns, params, key, batch, lambda shapes: shards.follow(shapes, params))
    return placement.state(TrainState(jnp.zeros((), jnp.int32), key, params, state, opt_state))


def _fresh(objective: Objective, key: jax.Array, batch: Batch, placement: Placement | None) -> tuple[Any, Any]:
    """Returns fresh parameters and state, each leaf where it will live."""
    shards = None if placement is None else placement.shards
    if placement is None or shards is None:
        return objective.init(key, batch)  # not in one jit: initialisers compile once per shape
    params, state = jax.eval_shape(objective.init, key, batch)
    where = shards.follow(params, params), shards.follow(state, params)
    return jax.jit(objective.init, out_shardings=where)(*placement.whole((key, batch)))


def _check_update(turn: Turn, whole: Objective, params: Any, state: Any, opt_state: Any, key: Any, batch: Any) -> None:
    """Traces what a turn lowers, and raises for a batch that it can't take, a loss or a state that can be none."""
    objective, step = turn.objective, jnp.zeros((), jnp.int32)

    def loss(params, state, traced, frozen, opt_state):
        own, inner = moved_by(turn, opt_state, params)
        scale_of(inner)  # raises where it stands wrong
        check_stands(inner)
        context = Context(step, key, dict(zip(whole.frozen, frozen, strict=True)), still=held_still(inner, own))
        outputs, state = objective.run(params, state, traced, context)
        objective.check(outputs, batch)  # outputs have shapes only, the batch has its values
        return result_of(objective, outputs, params, state, traced, context)

    frozen = [handle.tree for handle in whole.frozen]
    _, new_state, metrics = jax.eval_shape(loss, params, state, batch, frozen, opt_state)
    check_total(metrics)
    if jax.tree.structure(new_state) != jax.tree.structure(state):
        raise InputError("the objective must return a state of the structure that it was given")


def _check_told(turn: Turn, params: Any, opt_state: Any) -> None:
    """Traces an update of the optimiser alone, and raises where what a step tells it is too much or too little."""
    own, inner = moved_by(turn, opt_state, params)
    optimizer, scale = taking(turn.optimizer), scale_of(inner)

    def update(own, inner, value):
        known = as_told(own, value)
        if scale is not None:
            del known[GRAD_FN]
        return update_by(optimizer, own, inner, own, known)

    try:
        jax.eval_shape(update, own, inner, jnp.zeros(()))
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        few = "" if scale is None else " (no grad_fn under loss_scaled)"
        raise InputError(
            f"the optimizer can't make the update of a training step, which tells it value, grad, value_fn and "
            f"grad_fn{few}: {str(error).partition(chr(10))[0]}; jt.optim passes on what an optimiser has a name for, "
            f"optax.chain everything, and a gradient_transformation() of optax.MultiSteps nothing"
        ) from error


def _tell_of_narrow(turn: Turn, params: Any, opt_state: Any) -> None:
    """Warns of weights in few bits that the optimiser moves as they are."""
    own, inner = moved_by(turn, opt_state, params)
    notes = jax.tree.leaves(inner, is_leaf=lambda node: isinstance(node, Still))
    never = {path for note in notes if isinstance(note, Still) and note.begin is None for path in note.paths}
    if path := moves_badly(own, inner, never):
        kind = tree.leaves_by_path(own)[path].dtype
        warnings.warn(
            f"{path!r} is stored in {kind}, in which small updates are lost: put jt.optim.master_weights or "
            f"jt.optim.stochastic_rounding around the optimizer, or keep the weights in float32",
            stacklevel=3,
        )


def _check_batch(batch: Batch) -> None:
    check_batch(batch)
    check_masks(batch)


def _check_complete(params: Any, state: Any, fresh_state: Any) -> None:
    """Raises for weights without the statistics that they were trained with: 0 and 1 in their place ruin them."""
    for name in params or {}:
        if jax.tree.leaves(own := fresh_state.get(name, {})) and name not in (state or {}):
            raise InputError(
                f"params of {name!r} come without its {' and '.join(sorted(own))}: pass "
                f"state={{{name!r}: ...}}, such as fitted.state.state, beside params="
            )


def _local(leaf: Any) -> Any:
    """Returns a leaf placed on a mesh as a NumPy array: an explicit axis would become part of every type."""
    placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, jax.sharding.NamedSharding)
    return np.asarray(leaf) if placed and leaf.is_fully_addressable else leaf


def _replaced(fresh: Any, given: Any, what: str, *, split: bool) -> Any:
    if given is None:
        return fresh
    if unknown := sorted(given.keys() - fresh.keys()):
        raise InputError(f"{what}: no model is named {unknown[0]!r}; the objective trains {sorted(fresh)}")
    if not split:
        check_whole(given, what)
    for name, replacement in given.items():
        if any(wrong := tree.differences(tree.leaves_by_path(fresh[name]), tree.leaves_by_path(replacement))):
            raise InputError(
                f"{what}[{name!r}] does not fit the model {wrong}. jt.transfer(source, into, reinit=...) merges "
                f"weights of another head"
            )

    def put(old: Any, new: Any) -> jax.Array:
        if not split:
            return jnp.asarray(_local(new), old.dtype)
        return laid(new, old.sharding, old.dtype)

    return {  # the structure and dtypes are the model's own
        name: jax.tree.map(put, old, _like(old, given[name])) if name in given else old for name, old in fresh.items()
    }


def _owned(values: Any) -> Any:
    """Returns copies of strong type: the state is donated, and its first values may be an anchor's or a caller's."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype, copy=True), values)


def _like(old: Any, new: Any) -> Any:
    by_path = tree.leaves_by_path(new)
    return jax.tree_util.tree_map_with_path(lambda path, _: by_path[tree.path_of(path)], old)
