"""Whole-data passes now and then: pseudo-labels, centroids, prototypes, kept in the state of a run."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.devices import processes
from jaxtransfer.devices.parts import within_reach
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.train.arguments import check_takes
from jaxtransfer.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Refresh:
    """What of the model state is made anew before the steps 0, `every`, 2 · `every`, ...; for `jt.fit(refresh=...)`.

    Where updates alternate, a step is all turns, and a refresh comes before the first of them: a whole pass over the
    data is no part of a compiled step.

    Pseudo-labels of the whole target as in SHOT (Liang et al. 2020, arXiv:2002.08546), its centroids, the statistics of
    all data: an objective whose `setup` puts zeros of their shapes into the state reads them there, by the number of
    the example say, and `fn` fills them in from the weights of the moment. They are saved with the state.

        fitted = jt.fit(objective, optimizer, batches, steps=1000, refresh=jt.Refresh(100, pseudo_labels))

    Attributes:
      every: steps between two refreshes; under `steps_per_call=` a multiple of these.
      fn: `fn(state) -> {name: tree}`, entries of `state.state` that take the place of the old ones, of the same
        structure, shapes and types. It must depend on the state alone (and on data that stay as they are), so that a
        run that was stopped and goes on does as the unbroken one. The state may lie on a mesh; where its values are to
        be elsewhere, `jax.device_get` brings them to the host. What determines the result may be told by a method
        `fingerprint()` of it, which is compared when a run goes on; else that is its name.

    Raises:
      InputError: for a period below one, or what is no function of a state; in `fit`, for an entry that the state has
        not, or one of another structure, shape or type, by path.
    """

    every: int
    fn: Callable[[TrainState], Mapping[str, Any]]

    def __post_init__(self):
        if self.every < 1 or int(self.every) != self.every:
            raise InputError(f"Refresh: every must be a positive whole number of steps; got {self.every}")
        check_takes(self.fn, "the function of a Refresh", "state")

    def facts(self) -> dict[str, Any]:
        """Returns what it is, for the note of a run."""
        describe = getattr(self.fn, "fingerprint", None)
        name = getattr(self.fn, "__qualname__", type(self.fn).__name__)
        return {"every": int(self.every), "function": describe() if callable(describe) else name}

    def calls_of(self, together: int, *, asked: bool) -> int:
        """Returns how many steps may run in one call, so that none passes a refresh: `together` or a divisor.

        Raises:
          InputError: where so many were `asked` for, and they don't divide the period.
        """
        if asked and self.every % together:
            raise InputError(f"a refresh every {self.every} steps doesn't fall between calls of {together} steps each")
        return math.gcd(together, self.every)

    def at(self, number: int, state: TrainState) -> TrainState:
        """Returns the state that step `number` begins with."""
        if number % self.every:
            return state
        whole = within_reach(state)
        with processes.alone():  # over all of the data, and not this process's part
            made = self.fn(whole)
        if not isinstance(made, Mapping):
            raise InputError(f"a refresh gives a dict of entries of the state; got a {type(made).__name__}")
        new = {name: _like(name, state.state, own) for name, own in made.items()}
        new = processes.values_of_first(new)  # each has computed it; rounding may differ between machines
        return state._replace(state={**state.state, **new})


def check_refresh(refresh: Any) -> None:
    """Raises for what is no `Refresh`."""
    if refresh is not None and not isinstance(refresh, Refresh):
        raise InputError(f"refresh is a jt.Refresh(every, fn); got a {type(refresh).__name__}")


def _like(name: str, state: Mapping[str, Any], made: Any) -> Any:
    """Returns what was made as arrays of its own, which the step may donate, in the structure of the old entry."""
    if name not in state:
        raise unknown("entry of the state that a refresh makes", name, state)
    what = f"a refresh of {name!r}"
    tree.check_arrays(made, what)
    old, new = tree.leaves_by_path(state[name]), tree.leaves_by_path(made)
    if any(wrong := tree.differences(old, new)):
        raise InputError(f"{what} must keep structure and shapes {wrong}")
    for path, leaf in new.items():
        if (came := jnp.asarray(leaf).dtype) != old[path].dtype:
            where = "/".join(filter(None, (name, path)))
            raise InputError(f"{what} must keep types: {where} is {old[path].dtype} in the state; got {came}")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.array(new[tree.path_of(path)], leaf.dtype, copy=True), state[name]
    )
