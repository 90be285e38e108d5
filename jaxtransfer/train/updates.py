"""How many updates a run has made: fewer than it has seen batches where the optimiser accumulates their gradients."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def updates_made(step: Any, opt_state: Any) -> Any:
    """Returns the number of updates that an optimiser has made in `step` batches, int32: `step` without accumulation.

    Where parts of the parameters accumulate differently it is that of the part which is updated most often, of those
    that accumulate: a part beside them that doesn't may as well be frozen.
    """
    counts = _counts(opt_state)
    return step if not counts else jax.tree.reduce(jnp.maximum, counts)


def accumulates(opt_state: Any) -> bool:
    """Returns whether an update may take several batches: there is an `optax.MultiSteps` somewhere in the optimiser."""
    return bool(_counts(opt_state))


def per_update(entries: Iterable[str], old: dict[str, Any], new: dict[str, Any], updated: jax.Array) -> dict[str, Any]:
    """Returns the new state, the named entries as they were unless the weights were `updated`."""
    held = {
        name: jax.tree.map(lambda after, before: jnp.where(updated, after, before), new[name], old[name])
        for name in entries
    }
    return {**new, **held}


def _counts(opt_state: Any) -> list[Any]:
    """Counts of updates, one for each accumulation; where one stands inside of another, that of the inner one."""
    counts = []
    for node in jax.tree.leaves(opt_state, is_leaf=_is_accumulation):
        if _is_accumulation(node):
            counts += _counts(node.inner_opt_state) or [node.gradient_step]
    return counts


def _is_accumulation(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState)
