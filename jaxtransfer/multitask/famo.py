"""FAMO: all losses fall at one relative rate, without any gradient of a single task."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask.kinds import of_values, remembers


def _init(count: int) -> dict[str, jax.Array]:
    names = ("scales", "last", "mean", "square")
    seen = jnp.zeros(count, jnp.int32)
    return {**{name: jnp.zeros(count) for name in names}, "seen": seen, "updates": jnp.zeros((), jnp.int32)}


@of_values
@remembers(_init)
def famo(
    gram: Any, values: jax.Array, key: Any, state: Any, *, rate: float = 0.025, decay: float = 1e-3, least: Any = 0.0
) -> tuple[jax.Array, Any]:
    """Returns z_t / (c D_t), z = softmax(s), D_t = L_t − l_t + 1e-8, c = Σ_t z_t / D_t: that of Σ_t z_t log D_t / c.

    s has learned which task's log D falls the slowest: after each update it goes against the derivative of Σ_t
    softmax(s)_t (log D_t before − log D_t after), plus `decay` times s, by Adam. (Liu et al. 2023, "Fast adaptive
    multitask optimization", arXiv:2306.03792, and its released constants.) The released code runs the network once more
    on the batch to see what the update did; here the next batch tells, at no cost. A loss of exactly 0, of a task
    without a label in the batch, has the weight 0, and nothing is learned from it.

    Args:
      gram: not looked at.
      values: of the losses [T], each above its bound.
      key: nothing is drawn.
      state: s, the last log D, and the moments of Adam.
      rate: of the learning of s.
      decay: γ, which draws s back to 0.
      least: l, lower bounds of the losses, a number or one for each task.

    Returns:
      The weights [T], which sum to 1 unless all losses are 0, and the state.
    """
    there, updates = values != 0, state["updates"]
    above = jnp.where(there, values - jnp.asarray(least, values.dtype) + 1e-8, 1)
    above = jnp.where(above > 0, above, jnp.nan)
    logs = jnp.where(there, jnp.log(above), state["last"])
    told = there & (state["seen"] > 0)  # the first batch of a task tells of no update
    fell = jnp.where(told, state["last"] - logs, 0)
    shares = jnp.where(told, jax.nn.softmax(state["scales"]), 0)
    shares = shares / jnp.where(jnp.any(told), jnp.sum(shares), 1)
    slope = shares * (fell - shares @ fell) + decay * state["scales"]
    mean = 0.9 * state["mean"] + 0.1 * slope
    square = 0.999 * state["square"] + 0.001 * slope**2
    learned = jnp.any(told)
    number = jnp.maximum(updates, 1).astype(values.dtype)
    step = mean / (1 - 0.9**number) / (jnp.sqrt(square / (1 - 0.999**number)) + 1e-8)
    scales = state["scales"] - jnp.where(learned, rate * step, 0)
    relative = jnp.where(there, jax.nn.softmax(scales) / above, 0)
    total = jnp.sum(relative)
    return relative / jnp.where(jnp.any(there), total, 1), {
        "scales": scales,
        "last": logs,
        "mean": jnp.where(learned, mean, state["mean"]),
        "square": jnp.where(learned, square, state["square"]),
        "seen": jnp.where(there, 1, state["seen"]),
        "updates": updates + jnp.where(jnp.any(there), 1, 0),
    }
