"""Random loss weighting: other weights in each step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask.kinds import of_values


@of_values
def random_weights(
    gram: Any, values: jax.Array, key: Any, state: Any, *, draw: Callable[..., jax.Array] = jax.random.normal
) -> tuple[jax.Array, Any]:
    """Returns softmax(n), n drawn anew from a standard normal distribution in each step; they sum to 1.

    (Lin et al. 2022, "Reasonable effectiveness of random weighting", arXiv:2111.10603: a baseline that a rule should
    beat before it is believed.)

    Args:
      gram: not looked at.
      values: of the losses [T]; only their number counts.
      key: what is drawn with; 1 / T each where it is None.
      state: none.
      draw: `draw(key, shape)`, of what the softmax is taken: `jax.random.uniform` say.

    Returns:
      The weights [T], and the state as it is.
    """
    numbers = jnp.zeros(values.shape) if key is None else draw(key, values.shape)
    return jax.nn.softmax(numbers), state
