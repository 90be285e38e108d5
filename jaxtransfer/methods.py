"""Fine-tuning methods: each a function from a model and pretrained weights to the stages that train it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from jaxtransfer import optim
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives import classification, fisher_l2_sp, l2, l2_sp


class Stage(NamedTuple):
    """One training run of a method.

    Attributes:
      name: of the stage.
      objective: what it minimises; or a function that makes it from what the stage before reached, `(params, state)`.
      optimizer: what it minimises it with.
      share: its share of the method's steps.
      fresh: whether it starts from new weights, not from those of the stage before.
    """

    name: str
    objective: Objective | Callable[[Any, Any], Objective]
    optimizer: optax.GradientTransformation
    share: float = 1.0
    fresh: bool = False

    def objective_after(self, params: Any, state: Any) -> Objective:
        """Returns the objective, given what the stage before reached."""
        return self.objective if isinstance(self.objective, Objective) else self.objective(params, state)


def full(model: Model, optimizer: optax.GradientTransformation, **loss: Any) -> tuple[Stage, ...]:
    """Trains all weights from the pretrained ones."""
    return (Stage("full", classification(model, **loss), optimizer),)


def linear_probe(model: Model, optimizer: optax.GradientTransformation, **loss: Any) -> tuple[Stage, ...]:
    """Trains the head on frozen features, which are computed in inference mode."""
    objective = classification(model.inference(), **loss)
    return (Stage("linear-probe", objective, optim.only(optimizer, f"{model.name}/{model.head}")),)


def lp_ft(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    probe: float = 0.5,
    probe_optimizer: optax.GradientTransformation | None = None,
    **loss: Any,
) -> tuple[Stage, ...]:
    """Trains the head on frozen features, then all weights (Kumar et al. 2022, arXiv:2202.10054).

    Args:
      model: the model.
      optimizer: of the second stage.
      probe: the share of the steps that goes to the head, in (0, 1).
      probe_optimizer: of the first stage; the same by default.
      **loss: arguments of `classification`.

    Returns:
      Two stages; the second starts from the first one's weights.
    """
    if not 0 < probe < 1:
        raise InputError(f"probe is the share of the steps for the head, in (0, 1); got {probe}")
    (first,) = linear_probe(model, probe_optimizer or optimizer, **loss)
    (second,) = full(model, optimizer, **loss)
    return (first._replace(share=probe), second._replace(share=1 - probe))


def anchored(
    model: Model,
    optimizer: optax.GradientTransformation,
    anchor: Any,
    *,
    strength: float,
    fisher: Any = None,
    head_strength: float = 0.01,
    new_head: bool = True,
    **loss: Any,
) -> tuple[Stage, ...]:
    """Trains all weights under strength · ½‖w − w₀‖² on what was pretrained and β · ½‖w‖² on a new head: L2-SP.

    (Li et al. 2018, arXiv:1802.01483, equation 2, with α = strength and β = head_strength.)

    Args:
      model: the model.
      optimizer: of the stage.
      anchor: the pretrained weights w₀, a dict by model name.
      strength: α.
      fisher: weights of the squares, a tree like `anchor` (`fisher_diagonal`); all one by default.
      head_strength: β.
      new_head: whether the head starts afresh; a kept one is anchored like the rest.
      **loss: arguments of `classification`.

    Returns:
      One stage.
    """
    head = f"{model.name}/{model.head}"
    exclude = head if new_head else ()
    if fisher is None:
        penalty = l2_sp(anchor, strength=strength, exclude=exclude)
    else:
        penalty = fisher_l2_sp(anchor, fisher, strength=strength, exclude=exclude)
    objective = classification(model, **loss) + penalty
    if new_head:
        objective += l2(strength=head_strength, only=head)
    return (Stage("l2-sp" if fisher is None else "l2-sp-fisher", objective, optimizer),)


def discriminative(
    model: Model, optimizer: optax.GradientTransformation, *, decay: float = 0.75, **loss: Any
) -> tuple[Stage, ...]:
    """Trains all weights, each stage of the model `decay` times slower than the one above it."""
    return (Stage("layerwise-decay", classification(model, **loss), _layerwise(model, optimizer, decay)),)


def gradual(
    model: Model, optimizer: optax.GradientTransformation, *, every: int, adapt_statistics: bool = False, **loss: Any
) -> tuple[Stage, ...]:
    """Trains the head first and one more stage of the model after each `every` steps.

    What is still frozen runs in inference mode, unless `adapt_statistics` leaves its batch norm and dropout in training
    mode.
    """
    stages = [f"{model.name}/(?:{stage})" for stage in model.stages]
    unfreezing = optim.gradual_unfreeze(optimizer, stages, every=every, adapt_statistics=adapt_statistics)
    return (Stage("gradual", classification(model, **loss), unfreezing),)


def _layerwise(model: Model, optimizer, decay):
    stages = [f"{model.name}/(?:{stage})" for stage in model.stages]
    return optim.layerwise_decay(optimizer, stages, decay=decay)
