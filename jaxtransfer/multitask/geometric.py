"""The geometric mean of the losses: each task by its relative change."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask.kinds import of_values


@of_values
def geometric(gram: Any, values: jax.Array, key: Any, state: Any, *, epsilon: float = 1e-8) -> tuple[jax.Array, Any]:
    """Returns M / (T L_t), M = (Π_t L_t)^(1/T): the gradient is that of the geometric mean of the losses.

    (Chennupati et al. 2019, "MultiNet++", arXiv:1904.08492.) The released code multiplies the losses themselves, which
    for many tasks leaves the range of float32; here it is the mean of their logarithms. The loss that is reported stays
    the sum. A loss of exactly 0, of a task without a label in the batch, is left out of the mean, and T is the number
    of the others.

    Args:
      gram: not looked at.
      values: of the losses [T], not negative: with a negative one there is no such mean, and the weights are NaN.
      key: nothing is drawn.
      state: none.
      epsilon: what is added to each loss, so that the weight of one near 0 has a bound.

    Returns:
      The weights [T], and the state as it is.
    """
    there = values != 0
    some = jnp.maximum(jnp.sum(there), 1)
    logs = jnp.log(jnp.where(there, values + epsilon, 1))
    return jnp.where(there, jnp.exp(jnp.sum(logs) / some - logs) / some, 0), state
