"""What batch norm normalises by inside a task: a choice that few-shot code tends to hide."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model

STATE = "per_step"  # the entry of the state, beside the models, that holds the slots


class Statistics(NamedTuple):
    """How a task's forwards treat batch statistics.

    Attributes:
      support_train: whether the inner loop normalises by the support set's own statistics.
      query_train: whether the query set is normalised by its own statistics (transductive).
      per_step: whether the two hold in training only, evaluation normalising by running statistics of which there is
        one set, a slot, for each number of inner updates made.
    """

    support_train: bool
    query_train: bool
    per_step: bool = False

    def modes(self, train: bool) -> tuple[bool, bool]:
        """Returns whether support and query are normalised by their own statistics, in training or in evaluation."""
        own = train or not self.per_step
        return self.support_train and own, self.query_train and own


transductive = Statistics(support_train=True, query_train=True)
"""Each set is normalised by its own statistics, in training and in evaluation: what MAML's authors and most others do.
The predictions of a query example depend on the other query examples; the adaptation never sees them."""

running = Statistics(support_train=False, query_train=False)
"""Both sets are normalised by the running statistics of the state, as in ordinary inference: what pretraining or a
sum with an ordinary term has brought there. Nothing leaks between query examples."""

per_step = Statistics(support_train=True, query_train=True, per_step=True)
"""MAML++ (Antoniou et al. 2019, arXiv:1810.09502), for `maml` only: running statistics for each inner step.

In training each set is normalised by its own statistics. Inner update i moves slot i of the running statistics by the
support set, the loss after the last of `steps` updates moves slot `steps` by the query set; a slot's new value is the
mean over the tasks. In evaluation slot i normalises the support set in update i, and slot n the query set after n
updates, so that nothing leaks between query examples; beyond the steps that were trained it is the last slot.

The slots are `state["per_step"][model]`, leaves [steps + 1, ...]; the model's own state, for ordinary terms of a sum,
is left alone. They start from the model's first statistics; `init(..., state={"per_step": ...})` gives others."""


def first_slots(state: Any, models: Iterable[Model], steps: int) -> Any:
    """Returns `steps + 1` copies of each model's running state: leaves [steps + 1, ...]."""
    own = {model.name: state[model.name] for model in models if jax.tree.leaves(state.get(model.name, {}))}
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], steps + 1, axis=0), own)


def at_slot(state: Any, number: int | jax.Array) -> Any:
    """Returns the state in which each model with slots has the one after `number` inner updates, or the last one."""

    def slot(leaf):
        return leaf[jnp.minimum(number, leaf.shape[0] - 1)]

    return {**state, **jax.tree.map(slot, state.get(STATE, {}))}


def check_slots(state: Any, steps: int) -> None:
    """Raises where the state has slots for another number of steps."""
    if wrong := [leaf.shape for leaf in jax.tree.leaves(state.get(STATE, {})) if leaf.shape[0] != steps + 1]:
        raise InputError(
            f"per_step statistics of {steps} steps have leaves [{steps + 1}, ...]; got {wrong[0]}. Two terms of a sum "
            f"with per_step statistics need the same steps"
        )


def refuse_per_step(statistics: Statistics, what: str) -> None:
    """Raises where an objective without slots is asked for statistics per step."""
    if statistics.per_step:
        raise InputError(f"{what}: per_step statistics are for maml; expected transductive or running")
