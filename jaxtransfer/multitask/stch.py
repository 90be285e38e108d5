"""Smooth Tchebycheff scalarisation: the worst task counts most, smoothly."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.multitask.kinds import of_values, remembers


def _init(count: int) -> dict[str, jax.Array]:
    return {"total": jnp.zeros(count), "counted": jnp.zeros(count), "updates": jnp.zeros((), jnp.int32)}


@of_values
@remembers(_init)
def stch(
    gram: Any, values: jax.Array, key: Any, state: Any, *, mu: float = 1.0, warmup: int = 100
) -> tuple[jax.Array, Any]:
    """Returns T softmax(log(L / n) / μ)_t / L_t: the gradient is that of T μ log Σ_t exp(log(L_t / n_t) / μ).

    n_t is the mean of a loss over the first `warmup` updates, in which the weights are 1 / L_t, those of Σ_t log L_t.
    (Lin et al. 2024, "Smooth Tchebycheff scalarization", arXiv:2402.19078, and its released form on log losses, where
    the warm-up is four epochs and n the mean over one more.) A loss of exactly 0, of a task without a label in the
    batch, has the weight 0 and is not in the mean.

    Args:
      gram: not looked at.
      values: of the losses [T], not negative.
      key: nothing is drawn.
      state: the sums and counts of losses, and the number of updates.
      mu: μ > 0; near 0 the worst task alone counts.
      warmup: updates, at least 1.

    Returns:
      The weights [T], and the state.

    Raises:
      InputError: for μ that is not positive, and no warm-up.
    """
    if not mu > 0 or warmup < 1:
        raise InputError(f"stch: expected mu > 0 and warmup >= 1; got {mu} and {warmup}")
    updates, there = state["updates"], values != 0
    warm = updates < warmup
    usual = state["total"] / jnp.maximum(state["counted"], 1)
    worse = jnp.log(values / jnp.where(warm | (usual == 0), 1, usual) + 1e-20)
    worse = jnp.where(there, worse / mu, jnp.finfo(worse.dtype).min)
    shares = jnp.where(warm, 1, len(values) * jax.nn.softmax(worse))
    memory = {
        "total": jnp.where(warm, state["total"] + values, state["total"]),
        "counted": jnp.where(warm, state["counted"] + there, state["counted"]),
        "updates": updates + 1,
    }
    return jnp.where(there, shares / jnp.where(there, values + 1e-20, 1), 0), memory
