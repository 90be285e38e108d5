"""Matching networks: a query has the labels of the support examples that it attends to."""

import jax
import jax.numpy as jnp

from jaxtransfer.forward import FrozenModel
from jaxtransfer.meta.embed import few_shot, per_task
from jaxtransfer.meta.prototypical import Distance, check_temperature, cosine_distance
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def matching(
    model: Model | FrozenModel,
    *,
    ways: int,
    distance: Distance = cosine_distance,
    temperature: float = 1.0,
    output: str = "features",
    view: str = "image",
) -> Objective:
    """Builds the mean of -log Σ_{i: y_i = y} a_i over queries, a = softmax_i(-d(f(x), f(x_i)) / τ) over the support.

    Matching networks (Vinyals et al. 2016, arXiv:1606.04080), without the full-context embeddings (the LSTMs that let
    the support change the features). With the cosine distance and τ = 1 the attention is the softmax of the cosines,
    as in the paper. The logarithm is taken by log-sum-exp over the support of a class. A class with more support has
    more attention, as the formula says. Batches, batch norm and absent classes are as for `prototypical`. Metrics:
    `matching`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      ways: number of classes, N.
      distance: d, `distance(query [Q, D], support [S, D]) -> [Q, S]`.
      temperature: τ, above 0.
      output: name of the model's output.
      view: key of the inputs in the support and the query.

    Returns:
      An objective over the model's parameters.

    Raises:
      InputError: for `ways` below 1 or τ not above 0; at init, for a label outside [0, ways), an unknown output, and
        a batch that is no episode.
    """
    check_temperature(temperature)

    def classify(support, targets, query):
        attention = -distance(query, support) / temperature  # [Q, S], before the softmax
        return logsumexp_by_class(attention, targets)  # the cross-entropy normalises by the sum over all classes

    return few_shot("matching", model, per_task(classify), ways=ways, output=output, view=view)


def logsumexp_by_class(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes log Σ_{i: y_i = c} exp(s_i) of each class [Q, N], in memory Q · (S + N).

    Args:
      scores: s [Q, S].
      targets: one-hot labels y [S, N]; rows of zeros do not count.

    Returns:
      [Q, N]; 0, without gradient, for a class that is absent.
    """
    counts = jnp.any(targets > 0, axis=-1)
    label = jnp.where(counts, jnp.argmax(targets, axis=-1), targets.shape[-1])  # of what does not count: out of range
    fixed = jax.lax.stop_gradient(scores)
    largest = jax.ops.segment_max(fixed.T, label, num_segments=targets.shape[-1]).T
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    below = scores - jnp.take(largest, label, axis=-1, mode="clip")
    powers = jnp.exp(jnp.where(counts[None], below, -jnp.inf))
    total = jnp.matmul(powers, targets, precision="highest")
    return jnp.log(jnp.where(total > 0, total, 1)) + largest
