"""Optimiser recipes of transfer learning: which parameters move, how fast, and when; all through optax."""

from collections.abc import Hashable, Mapping, Sequence

import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError

Optimizer = optax.GradientTransformation


def by_path(rules: Mapping[str, Optimizer]) -> Optimizer:
    """Gives each parameter the optimiser of the first pattern that selects it.

    Args:
      rules: optimisers by path pattern, such as `{"head": optax.adam(1e-2), ".*": optax.adam(1e-4)}`.

    Returns:
      An optimiser; its `init` raises `InputError` where a parameter is selected by no pattern or a pattern by none.
    """
    transforms: dict[Hashable, Optimizer] = {str(number): optimizer for number, optimizer in enumerate(rules.values())}
    numbers = {pattern: str(number) for number, pattern in enumerate(rules)}
    return optax.multi_transform(transforms, lambda params: tree.label(params, numbers))


def freeze(optimizer: Optimizer, patterns: tree.Patterns) -> Optimizer:
    """Trains everything but the parameters that the patterns select; the frozen ones keep no optimiser state."""
    rules = dict.fromkeys(tree.as_patterns(patterns), optax.set_to_zero())
    return by_path({**rules, ".*": optimizer})


def only(optimizer: Optimizer, patterns: tree.Patterns) -> Optimizer:
    """Trains only the parameters that the patterns select: the head, in a linear probe."""
    return by_path({**dict.fromkeys(tree.as_patterns(patterns), optimizer), ".*": optax.set_to_zero()})


def layerwise_decay(optimizer: Optimizer, stages: Sequence[str], *, decay: float) -> Optimizer:
    """Scales the update of stage s by decay^(S − 1 − s): the head learns at the full rate, the first layer slowest.

    (Howard & Ruder 2018, arXiv:1801.06146, "discriminative fine-tuning"; Clark et al. 2020, arXiv:2003.10555.)

    Args:
      optimizer: whose updates are scaled.
      stages: path patterns from the input to the head, that cover every parameter: `model.stages`.
      decay: in (0, 1].

    Returns:
      An optimiser.
    """
    if not 0 < decay <= 1:
        raise InputError(f"decay must be in (0, 1]; got {decay}")
    rates = {pattern: decay ** (len(stages) - 1 - depth) for depth, pattern in enumerate(stages)}
    return optax.chain(optimizer, by_path({pattern: optax.scale(rate) for pattern, rate in rates.items()}))


def gradual_unfreeze(optimizer: Optimizer, stages: Sequence[str], *, every: int) -> Optimizer:
    """Trains the last stage first and one more, from the head downwards, after each `every` steps.

    (Howard & Ruder 2018, arXiv:1801.06146.) A stage's optimiser state starts when it is unfrozen.

    Args:
      optimizer: trains each stage once it is unfrozen.
      stages: path patterns from the input to the head, that cover every parameter: `model.stages`.
      every: steps between two unfreezings.

    Returns:
      An optimiser.
    """
    if every < 1:
        raise InputError(f"every must be at least one step; got {every}")

    def from_step(begin: int) -> Optimizer:
        if begin == 0:
            return optimizer
        return optax.conditionally_mask(optimizer, lambda step, **_: jnp.greater_equal(step, begin))

    count = len(stages)
    return by_path({pattern: from_step((count - 1 - depth) * every) for depth, pattern in enumerate(stages)})
