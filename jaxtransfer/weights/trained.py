"""The weights that train: those of the run's parameters under the model's name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtransfer.model import Model

Tree = Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the weights that train; see `Weights`."""

    model: Model

    held = None
    trained = True
    inference = False
    handles = ()
    entries = ()

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    def example(self, key: Any, inputs: Any) -> Tree:
        """Returns fresh variables."""
        return self.model.family[-1].init(key, inputs)  # of a twin the whole, by the model that it shares with

    def init(self, params: Tree, state: Tree, *, moves: int = 0) -> dict[str, Tree]:
        """Returns nothing: the objective makes a model's fresh weights."""
        return {}

    def advance(self, params: Tree, state: Tree, step: Any, *, runs: bool = True) -> dict[str, Tree]:
        """Returns nothing: the optimiser moves them."""
        return {}

    def read(self, params: Tree, state: Tree, frozen: Callable[[Any], Tree]) -> Tree:
        """Returns the parameters and the running state under the model's name."""
        return {"params": self.model.whole(params), **state.get(self.name, {})}

    def keep(self, state: Tree, new: Tree) -> Tree:
        """Returns the state with the new running state of the model."""
        return {**state, self.name: dict(new)}
