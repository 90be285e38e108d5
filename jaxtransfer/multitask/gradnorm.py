"""GradNorm: weights that learn to make gradients equally long, longer for tasks that lag behind."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.multitask.kinds import remembers


def _init(count: int) -> dict[str, jax.Array]:
    return {"scales": jnp.zeros(count), "first": jnp.zeros(count), "updates": jnp.zeros((), jnp.int32)}


@remembers(_init)
def gradnorm(
    gram: jax.Array, values: jax.Array, key: Any, state: Any, *, alpha: float = 1.5, rate: float = 0.025
) -> tuple[jax.Array, Any]:
    """Returns w = T softmax(s), s having learned to lower Σ_t |w_t ‖g_t‖ − Ḡ r_t^α|.

    Ḡ is the mean of w_t ‖g_t‖ and r_t = (L_t / L_t(0)) / mean_s (L_s / L_s(0)), how far a task lags behind; both are
    constants to s. (Chen et al. 2018, arXiv:1711.02257.) The paper learns w itself and scales its sum to T after each
    step; as in LibMTL it is a softmax, which no step makes negative. s moves by one step of gradient descent per
    update, on the sum divided by Ḡ, so that the rate means the same whatever the scale of the losses; LibMTL's Adam,
    which it shares with the network, sees to that otherwise. L_t(0) is the loss at the first update. The weights of a
    step are those before it is learned from. A task whose loss is exactly 0, as it has no label in the batch, has no
    part in the sum nor in the means, and its L_t(0) is that of the first batch with one.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T] over the shared parameters.
      values: of the losses [T].
      key: nothing is drawn.
      state: s, L(0) and the number of updates.
      alpha: α, how strongly tasks are drawn to one pace.
      rate: of the learning of s.

    Returns:
      The weights [T], and the state.
    """
    count = len(values)
    there = values != 0
    some = jnp.maximum(jnp.sum(there), 1)
    first = jnp.where(state["first"] == 0, values, state["first"])
    left = jnp.where(there, values / jnp.where(first != 0, first, 1), 0)
    mean_left = jnp.sum(left) / some
    behind = left / jnp.where(mean_left != 0, mean_left, 1)
    goal = jnp.where(behind > 0, jnp.where(behind > 0, behind, 1) ** alpha, 0)

    weights = count * jax.nn.softmax(state["scales"])
    lengths = jnp.where(there, jnp.sqrt(jnp.diagonal(gram)), 0)
    mean = jnp.sum(weights * lengths) / some
    relative = lengths / jnp.where(mean > 0, mean, 1)
    by_weight = jnp.sign(weights * relative - goal * (mean > 0)) * relative
    slopes = weights * (by_weight - jnp.mean(weights * by_weight))
    return weights, {"scales": state["scales"] - rate * slopes, "first": first, "updates": state["updates"] + 1}
