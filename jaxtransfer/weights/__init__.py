"""What a forward runs on: the weights that train, frozen ones, or a moving average of those that train."""

from typing import Any

from jaxtransfer.model import Model
from jaxtransfer.weights.average import Average, ema
from jaxtransfer.weights.frozen import Frozen, FrozenModel, frozen
from jaxtransfer.weights.protocol import Weights
from jaxtransfer.weights.trained import Trained

__all__ = ["Average", "Frozen", "FrozenModel", "Trained", "Weights", "ema", "frozen", "is_fixed", "on", "weights_of"]


def weights_of(model: Model | FrozenModel | Average) -> Weights:
    """Returns the weights that a model runs on: those that train, unless it brings its own."""
    return model if isinstance(model, FrozenModel | Average) else Trained(model)


def is_fixed(model: Any) -> bool:
    """Returns whether something is a model that no gradient reaches: a frozen one, or an average."""
    return isinstance(model, FrozenModel | Average)


def on(model: Model, variables: Frozen | Average | None) -> Weights:
    """Returns the weights of a model that runs on `variables`, as `Forward` holds them: None for those that train."""
    if isinstance(variables, Average):
        return variables
    return Trained(model) if variables is None else FrozenModel(model, variables)
