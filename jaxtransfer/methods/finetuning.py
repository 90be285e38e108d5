"""Fine-tuning methods: each a function from a model and pretrained weights to the phases that train it."""

from collections.abc import Mapping, Sequence
from typing import Any

import optax

from jaxtransfer import objectives, optim
from jaxtransfer.errors import InputError
from jaxtransfer.forward import FrozenModel
from jaxtransfer.methods.phases import Phase
from jaxtransfer.model import Model
from jaxtransfer.objectives import classification, fisher_l2_sp, l2, l2_sp


def full(model: Model, optimizer: optax.GradientTransformation, **loss: Any) -> tuple[Phase, ...]:
    """Trains all weights from the pretrained ones."""
    return (Phase("full", classification(model, **loss), optimizer),)


def linear_probe(model: Model, optimizer: optax.GradientTransformation, **loss: Any) -> tuple[Phase, ...]:
    """Trains the head on frozen features, which are computed in inference mode."""
    objective = classification(model.inference(), **loss)
    return (Phase("linear-probe", objective, optim.only(optimizer, f"{model.name}/{model.head}")),)


def lp_ft(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    probe: float = 0.5,
    probe_optimizer: optax.GradientTransformation | None = None,
    **loss: Any,
) -> tuple[Phase, ...]:
    """Trains the head on frozen features, then all weights (Kumar et al. 2022, arXiv:2202.10054).

    Args:
      model: the model.
      optimizer: of the second phase.
      probe: the share of the steps that goes to the head, in (0, 1).
      probe_optimizer: of the first phase; the same by default.
      **loss: arguments of `classification`.

    Returns:
      Two phases; the second starts from the first one's weights.
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
) -> tuple[Phase, ...]:
    """Trains all weights under strength · ½‖w − w₀‖² on what was pretrained and β · ½‖w‖² on a new head: L2-SP.

    (Li et al. 2018, arXiv:1802.01483, equation 2, with α = strength and β = head_strength.)

    Args:
      model: the model.
      optimizer: of the phase.
      anchor: the pretrained weights w₀, a dict by model name.
      strength: α.
      fisher: weights of the squares, a tree like `anchor` (`fisher_diagonal`); all one by default.
      head_strength: β.
      new_head: whether the head starts afresh; a kept one is anchored like the rest.
      **loss: arguments of `classification`.

    Returns:
      One phase.
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
    return (Phase("l2-sp" if fisher is None else "l2-sp-fisher", objective, optimizer),)


def delta(
    model: Model,
    optimizer: optax.GradientTransformation,
    source: FrozenModel,
    *,
    taps: str | Sequence[str],
    strength: float = 0.01,
    head_strength: float = 0.01,
    new_head: bool = True,
    weights: Mapping[str, Any] | None = None,
    **loss: Any,
) -> tuple[Phase, ...]:
    """Trains all weights while feature maps are held where the pretrained network's are, a new head decays: DELTA.

    (Li et al. 2019, arXiv:1901.09229, equation 3, with α = strength and β = head_strength.)

    Args:
      model: the model.
      optimizer: of the phase.
      source: the pretrained network, `jt.frozen(model.named("source"), variables)`.
      taps: the outputs that are held, see `jt.delta`.
      strength: α.
      head_strength: β.
      new_head: whether the head starts afresh.
      weights: attention by tap, see `jt.filter_weights`.
      **loss: arguments of `classification`.

    Returns:
      One phase.
    """
    held = objectives.delta(model, source, taps=taps, strength=strength, weights=weights)
    objective = classification(model, **loss) + held
    if new_head:
        objective += l2(strength=head_strength, only=f"{model.name}/{model.head}")
    return (Phase("delta", objective, optimizer),)


def bss(
    model: Model, optimizer: optax.GradientTransformation, *, k: int = 1, strength: float = 1e-3, **loss: Any
) -> tuple[Phase, ...]:
    """Trains all weights while the weakest directions of each batch's features are shrunk: `jt.bss`."""
    objective = classification(model, **loss) + objectives.bss(model, k=k, strength=strength)
    return (Phase("bss", objective, optimizer),)


def discriminative(
    model: Model, optimizer: optax.GradientTransformation, *, decay: float = 0.75, **loss: Any
) -> tuple[Phase, ...]:
    """Trains all weights, each stage of the model `decay` times slower than the one above it."""
    return (Phase("layerwise-decay", classification(model, **loss), _layerwise(model, optimizer, decay)),)


def gradual(
    model: Model, optimizer: optax.GradientTransformation, *, every: int, adapt_statistics: bool = False, **loss: Any
) -> tuple[Phase, ...]:
    """Trains the head first and one more stage of the model after each `every` steps.

    What is still frozen runs in inference mode, unless `adapt_statistics` leaves its batch norm and dropout in training
    mode.
    """
    stages = [f"{model.name}/(?:{stage})" for stage in model.stages]
    unfreezing = optim.gradual_unfreeze(optimizer, stages, every=every, adapt_statistics=adapt_statistics)
    return (Phase("gradual", classification(model, **loss), unfreezing),)


def _layerwise(model: Model, optimizer, decay):
    stages = [f"{model.name}/(?:{stage})" for stage in model.stages]
    return optim.layerwise_decay(optimizer, stages, decay=decay)
