"""Weights that are never trained: handles on trees, and models with such weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.model import FROZEN, Model
from jaxtransfer.tree import check_arrays

Tree = Any


class Frozen:
    """A handle on a tree that is never trained: an anchor, a teacher's weights, a Fisher diagonal.

    The compiled step takes the tree as an argument of its own, so it is neither differentiated, nor donated, nor
    baked into the program. Handles on the same tree are equal: it travels once.
    """

    def __init__(self, tree: Tree):
        check_arrays(tree, "what is held fixed")
        self.tree = tree
        self.placed: dict[Any, Tree] = {}  # by placement: training and evaluation share what is on the devices

    def __eq__(self, other):
        return isinstance(other, Frozen) and self.tree is other.tree

    def __hash__(self):
        return id(self.tree)


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A model with weights that do not train; made by `jt.frozen`. See `Weights`."""

    model: Model
    variables: Frozen

    trained = False
    inference = True
    entries = ()

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @property
    def held(self) -> Frozen:
        """The handle on its weights."""
        return self.variables

    @property
    def handles(self) -> tuple[Frozen, ...]:
        """The handle on its weights."""
        return (self.variables,)

    @property
    def part(self) -> Model:
        """It as a model with nothing to train, of which others are made: its weights are that model's frozen part."""
        model, inner = self.model, dict(self.model.frozen)

        def apply(variables, inputs, *, train, key, axis=None, still=None):
            known = variables[FROZEN]
            own = {**known["variables"], **({FROZEN: known["inner"]} if inner else {})}
            return model.apply(own, inputs, train=False, key=None)[0], {}

        frozen = {"variables": self.variables, **({"inner": inner} if inner else {})}
        return Model(lambda key, inputs: {}, apply, model.name, frozen=frozen)

    def example(self, key: Any, inputs: Any) -> Tree:
        """Returns the weights themselves."""
        return self.variables.tree

    def init(self, params: Tree, state: Tree, *, moves: int = 0) -> dict[str, Tree]:
        """Returns nothing: they are no part of the state."""
        return {}

    def advance(self, params: Tree, state: Tree, step: Any, *, runs: bool = True) -> dict[str, Tree]:
        """Returns nothing: they stay."""
        return {}

    def read(self, params: Tree, state: Tree, frozen: Callable[[Any], Tree]) -> Tree:
        """Returns the frozen tree."""
        return frozen(self.variables)

    def keep(self, state: Tree, new: Tree) -> Tree:
        """Returns the state as it is."""
        return state


def fixed_at(model: Model, variables: Tree) -> FrozenModel:
    """Returns a model at the weights of `variables`, or at those of its name in a training state; see `frozen`."""
    if hasattr(variables, "params") and hasattr(variables, "state"):
        if model.name not in variables.params:
            raise InputError(f"no model {model.name!r} was trained in that state; it has {sorted(variables.params)}")
        variables = {"params": model.whole(variables.params), **variables.state.get(model.name, {})}
    if FROZEN in variables and model.frozen:  # which comes along with the model
        variables = {kind: values for kind, values in variables.items() if kind != FROZEN}
    return FrozenModel(model, Frozen(variables))
