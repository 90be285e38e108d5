"""What a run watches besides its terms: the learning rate, the gradient's norm, the weights that follow schedules."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.loss_scale import LOSS_SCALE, is_skip
from jaxtransfer.objective import Objective

_RATE, _NORM, _WEIGHT = "learning_rate", "gradient_norm", "weight"


def watched(objective: Objective, step: Any, grads: Any, opt_state: Any, *, turn: str = "") -> dict[str, jax.Array]:
    """Returns what is told of an update, scalars by name.

    Args:
      objective: what it lowers; of each term with a schedule as its weight the weight, `weight/<term>`.
      step: the updates made before.
      grads: the gradient; its global norm, `gradient_norm`, in at least float32.
      opt_state: the optimiser's state after the update; where an `optax.inject_hyperparams` in it tells the learning
        rate, that is `learning_rate`; where several do, `learning_rate/0` and so on in the order of the state.
      turn: the name of the turn, of updates that alternate: `gradient_norm/<turn>`, `weight/<turn>/<term>`.
    """
    squares = [jnp.sum(jnp.square(jnp.abs(_wide(leaf)))) for leaf in jax.tree.leaves(grads)]
    values = {_NORM: jnp.sqrt(sum(squares, start=jnp.zeros(())))}
    rates = [node.hyperparams[_RATE] for node in jax.tree.leaves(opt_state, is_leaf=_tells) if _tells(node)]
    for number, rate in enumerate(rates):
        values[_RATE if len(rates) == 1 else f"{_RATE}/{number}"] = _wide(jnp.asarray(rate))
    for weight, term in objective.terms:
        if callable(weight) and term.name:
            values[f"{_WEIGHT}/{term.name}"] = jnp.asarray(weight(step), jnp.float32)
    return values if not turn else {_of_turn(name, turn): value for name, value in values.items()}


def _of_turn(name: str, turn: str) -> str:
    what, *more = name.split("/", 1)
    return "/".join((what, turn, *more))


def is_watched(name: str) -> bool:
    """Whether a metric is one of these, and none that a term reports."""
    return name.partition("/")[0] in (_RATE, _NORM, LOSS_SCALE) or name.startswith(f"{_WEIGHT}/")


def is_of_a_moment(name: str) -> bool:
    """Whether the last value counts, and not the mean over several steps."""
    return is_watched(name) and name.partition("/")[0] != _NORM and not is_skip(name)


def means(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns what is told of several steps, whose metrics are stacked: their means, or the last value.

    A value that is not finite is left out where its update was skipped, unless none is left: the scale of the loss was
    too large.
    """
    skips = [values for name, values in metrics.items() if is_skip(name)]
    skipped = sum(skips, start=jnp.zeros(())) > 0

    def mean(values):
        if not skips:
            return jnp.mean(values)
        counts = jnp.isfinite(values) | ~skipped
        return jnp.mean(values, where=counts)

    return {name: values[-1] if is_of_a_moment(name) else mean(values) for name, values in metrics.items()}


def _tells(node: Any) -> bool:
    return isinstance(known := getattr(node, "hyperparams", None), dict) and _RATE in known


def _wide(leaf: Any) -> Any:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
