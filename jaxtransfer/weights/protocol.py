"""What an objective asks of the weights that a forward runs on, whatever kind they are."""

from collections.abc import Callable
from typing import Any, Protocol

from jaxtransfer.model import Model

Tree = Any


class Weights(Protocol):
    """A model with its weights: where they come from, what they keep in the state, and how they follow the updates.

    Two of them are equal where they give one model the same weights. `params` and `state` are dicts by model name.
    """

    @property
    def model(self) -> Model:
        """The model that runs."""
        ...

    @property
    def name(self) -> str:
        """What it is called: the key of its draws, and of its state where it has one of its own."""
        ...

    @property
    def held(self) -> Any:
        """What a `Forward` holds of it as `variables`."""
        ...

    @property
    def trained(self) -> bool:
        """Whether gradients reach them; the outputs of others are cut off from differentiation."""
        ...

    @property
    def inference(self) -> bool:
        """Whether they run in inference mode in training too."""
        ...

    @property
    def handles(self) -> tuple[Any, ...]:
        """The `Frozen` trees that `read` asks for."""
        ...

    @property
    def entries(self) -> tuple[str, ...]:
        """The names of what they keep in the state besides the model's own; it moves once per update."""
        ...

    def example(self, key: Any, inputs: Any) -> Tree:
        """Returns variables of the shapes that the model runs on, to size things by."""
        ...

    def init(self, params: Tree, state: Tree, *, moves: int = 0) -> dict[str, Tree]:
        """Returns their entries of the state as the model begins; `moves`: updates that count as made."""
        ...

    def advance(self, params: Tree, state: Tree, step: Any, *, runs: bool = True) -> dict[str, Tree]:
        """Returns their entries of the state once they have followed what `step` updates have made of the model.

        Where nothing `runs` on them their running state follows the model's, too.
        """
        ...

    def read(self, params: Tree, state: Tree, frozen: Callable[[Any], Tree]) -> Tree:
        """Returns the variables that the model runs on; `frozen` gives the tree behind a handle."""
        ...

    def keep(self, state: Tree, new: Tree) -> Tree:
        """Returns the state after a run of the model that gave the collections `new`."""
        ...
