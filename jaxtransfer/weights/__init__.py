"""What a forward runs on: the weights that train, frozen ones, or a moving average of those that train."""

from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.weights.average import Average, ema
from jaxtransfer.weights.frozen import Frozen, FrozenModel, fixed_at
from jaxtransfer.weights.protocol import Weights
from jaxtransfer.weights.statistics import recompute_statistics
from jaxtransfer.weights.trained import Trained

__all__ = [
    "Average",
    "Frozen",
    "FrozenModel",
    "Trained",
    "Weights",
    "averaged_with",
    "ema",
    "frozen",
    "is_fixed",
    "on",
    "recompute_statistics",
    "weights_of",
]


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


def averaged_with(model: Model | Average, decay: Any, **how: Any) -> Average:
    """Returns the moving average of a model, `ema(model, decay, ...)`; one that is given as it is."""
    return model if isinstance(model, Average) else ema(model, decay, **how)


def frozen(model: Model | Average, variables: Any) -> FrozenModel:
    """Returns `model` with weights that do not train: a teacher, run in inference mode.

    Args:
      model: the model; or a moving average of one, `jt.ema(model)`, that a training state holds.
      variables: `{"params": ..., **state}`; or a training state, such as `fitted.state`, in which the model of this
        name was trained.

    Raises:
      InputError: for a training state without a model or an average of that name.
    """
    if not isinstance(model, Average):
        return fixed_at(model, variables)
    if not hasattr(variables, "params") or not hasattr(variables, "state"):
        raise InputError(f"the average {model.name!r} is part of a training state, fitted.state; give that one")
    if model.name not in variables.state:
        raise InputError(f"no average {model.name!r} was kept in that state; it has {sorted(variables.state)}")
    return FrozenModel(model.model, Frozen(model.variables(variables.params, variables.state)))
