"""What a run is at a moment: one pytree, from which everything that follows is determined."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Context, Objective


class TrainState(NamedTuple):
    """The state of a run.

    Attributes:
      step: updates made so far, int32 scalar; also the position in the data.
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


def init(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    batch: Batch,
    *,
    params: Any = None,
    state: Any = None,
) -> TrainState:
    """Makes the first state of a run and checks that the objective fits the batch, before anything is compiled.

    Args:
      objective: what will be trained.
      optimizer: sees the parameters that the run starts from, transferred ones included.
      key: draws the initial weights and everything after.
      batch: an example of the batches to come.
      params: weights to start from, for some or all models; copied, so that a run may start at its own anchor.
      state: batch statistics to start from, for some or all models; copied.

    Returns:
      The state at step 0.

    Raises:
      InputError: where the batch lacks an entry, labels are out of range, given weights do not fit the models, a
        penalty does not cover the parameters, or two terms report a metric of one name.
    """
    _check_batch(batch)
    fresh, fresh_state = jax.jit(objective.init)(key, batch)
    params = _replaced(fresh, params, "params")
    state = _replaced(fresh_state, state, "state")
    ctx = Context(step=jnp.zeros((), jnp.int32), key=key)
    frozen = [handle.tree for handle in objective.frozen]

    def loss(params, state, batch, frozen):
        context = Context(ctx.step, ctx.key, dict(zip(objective.frozen, frozen, strict=True)))
        return objective(params, state, batch, context)

    value, new_state, _ = jax.eval_shape(loss, params, state, batch, frozen)
    if value.shape != ():
        raise InputError(f"an objective's loss is a scalar; got shape {value.shape}")
    if jax.tree.structure(new_state) != jax.tree.structure(state):
        raise InputError("the objective must return a state of the structure that it was given")
    _check_labels(objective, params, state, batch)
    return TrainState(jnp.zeros((), jnp.int32), key, params, state, jax.jit(optimizer.init)(params))


def _check_batch(batch: Batch) -> None:
    sizes = {p: jnp.shape(leaf)[:1] for p, leaf in tree.leaves_by_path(batch).items()}
    if not sizes:
        raise InputError("expected a batch of arrays; got an empty one")
    if scalars := [p for p, size in sizes.items() if not size]:
        raise InputError(f"every entry of a batch has a leading batch dimension; {scalars[0]!r} is a scalar")


def _check_labels(objective: Objective, params, state, batch) -> None:
    """Raises for integer labels beyond the logits of the forward on the same view's images."""
    for forward in objective.forwards:
        *domain, _ = forward.view
        home = batch
        for key in domain:
            home = home[key]
        labels = home.get("label")
        if labels is None or not jnp.issubdtype(labels.dtype, jnp.integer) or isinstance(labels, jax.core.Tracer):
            continue
        outputs = jax.eval_shape(lambda p, s, b, f=forward: _logits(f, p, s, b), params, state, batch)
        if outputs is None or not jnp.size(labels):
            continue
        classes, low, high = outputs.shape[-1], int(labels.min()), int(labels.max())
        keep = home.get("mask")
        if keep is None and (low < 0 or high >= classes):
            bad = low if low < 0 else high
            raise InputError(
                f"labels must be in [0, {classes}) for the classes of model {forward.model.name!r}; got {bad}. "
                f"Build the model with as many classes as the data set has"
            )


def _logits(forward, params, state, batch):
    inputs = batch
    for key in forward.view:
        inputs = inputs[key]
    name = forward.model.name
    variables = forward.variables.tree if forward.variables else {"params": params[name], **state.get(name, {})}
    outputs, _ = forward.model.apply(variables, inputs, train=False, key=None)
    return outputs.get("logits")


def _replaced(fresh: Any, given: Any, what: str) -> Any:
    if given is None:
        return fresh
    if unknown := sorted(given.keys() - fresh.keys()):
        raise InputError(f"{what}: no model is named {unknown[0]!r}; the objective trains {sorted(fresh)}")
    for name, replacement in given.items():
        if any(wrong := tree.differences(tree.leaves_by_path(fresh[name]), tree.leaves_by_path(replacement))):
            raise InputError(
                f"{what}[{name!r}] does not fit the model {wrong}. jt.transfer(source, into, reinit=...) merges "
                f"weights of another head"
            )
    # The structure and dtypes are the model's own; the values are copies, so a donated state never takes the source's.
    return {
        name: jax.tree.map(lambda old, new: jnp.array(new, old.dtype, copy=True), old, _like(old, given[name]))
        if name in given
        else old
        for name, old in fresh.items()
    }


def _like(old: Any, new: Any) -> Any:
    by_path = tree.leaves_by_path(new)
    return jax.tree_util.tree_map_with_path(lambda path, _: by_path[tree.path_of(path)], old)
