"""Prototypical networks: a class is the mean of its support features."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.forward import FrozenModel
from jaxtransfer.meta.embed import class_means, few_shot, per_task
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective

Distance = Callable[[jax.Array, jax.Array], jax.Array]
_AT_ONCE = 2**20  # differences held at a time


def squared_euclidean(query: jax.Array, points: jax.Array) -> jax.Array:
    """Computes ‖q - p‖² of each pair, from the differences themselves: nothing cancels, as in ‖q‖² - 2qp + ‖p‖².

    Where the differences Q · N · D are many they are made for some of the D coordinates at a time, and made again for
    the gradient: a few times the memory of the result.

    Args:
      query: [..., Q, D].
      points: [..., N, D].

    Returns:
      [..., Q, N], in at least float32.
    """
    dtype = jnp.promote_types(jnp.result_type(query, points), jnp.float32)
    query, points = query.astype(dtype), points.astype(dtype)
    shape = (*jnp.broadcast_shapes(query.shape[:-2], points.shape[:-2]), query.shape[-2], points.shape[-2])
    size = query.shape[-1]
    width = max(1, _AT_ONCE // max(1, math.prod(shape)))
    if width >= size:
        return _sum_of_squares(query, points)
    blocks = -(-size // width)

    def split(x):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * width - size)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, width), -2, 0)

    @jax.checkpoint
    def add(total, block):
        return total + _sum_of_squares(*block), None

    return jax.lax.scan(add, jnp.zeros(shape, dtype), (split(query), split(points)))[0]


def _sum_of_squares(query, points):
    return jnp.sum((query[..., :, None, :] - points[..., None, :, :]) ** 2, axis=-1)


def cosine_distance(query: jax.Array, points: jax.Array) -> jax.Array:
    """Computes 1 - qp / (‖q‖ ‖p‖) of each pair, in [0, 2]; 1 for a zero vector, with a gradient of zero.

    Args:
      query: [..., Q, D].
      points: [..., N, D].

    Returns:
      [..., Q, N], in at least float32.
    """
    return 1 - jnp.einsum("...qd,...nd->...qn", unit(query), unit(points), precision="highest")


def unit(vectors: jax.Array) -> jax.Array:
    """Computes x / ‖x‖ over the last axis; zero, with a gradient of zero, where no |x_j| reaches 10⁻¹².

    Args:
      vectors: [..., D], of any scale: squares neither overflow nor underflow.

    Returns:
      [..., D], in at least float32.
    """
    vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))  # the result knows no scale
    some = largest >= 1e-12
    scaled = jnp.where(some, vectors, 0) / jnp.where(some, largest, 1)
    square = jnp.sum(scaled**2, axis=-1, keepdims=True)  # at least 1: the largest entry is ±1
    return scaled / jnp.sqrt(jnp.where(some, square, 1))


def prototypical(
    model: Model | FrozenModel,
    *,
    ways: int,
    distance: Distance = squared_euclidean,
    temperature: float = 1.0,
    output: str = "features",
    view: str = "image",
) -> Objective:
    """Builds the cross-entropy of queries with logits -d(f(x), p_c) / τ, p_c the mean of the support features of c.

    Prototypical networks (Snell et al. 2017, arXiv:1703.05175). A batch is one of episodes, as for `maml`: `support`
    and `query`, each with the inputs [T, S or Q, ...], `label` integers [T, S or Q], and where there is padding `mask`.
    The support need not be balanced. One forward runs over all of it, so that batch norm sees the global batch in
    training and its running statistics in evaluation. The loss is the mean over all queries that count. A class
    without support is ruled out: its logit is finite and far below the others. Metrics: `prototypical`, `accuracy`.

    Args:
      model: what gives `output` [B, ...], flattened to [B, D].
      ways: number of classes, N.
      distance: d, `distance(query [Q, D], prototypes [N, D]) -> [Q, N]`: `squared_euclidean`, `cosine_distance`.
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
        return -distance(query, class_means(support, targets)) / temperature

    return few_shot("prototypical", model, per_task(classify), ways=ways, output=output, view=view)


def check_temperature(temperature: float) -> None:
    """Raises unless the temperature is above 0."""
    if not temperature > 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
