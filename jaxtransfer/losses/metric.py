"""Triplet losses: an example is to be nearer to one of its class than to one of another, by a margin."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._distances import squared_distances
from jaxtransfer.losses._numerics import kept_rows, pick, root, wide

Hinge = Callable[[jax.Array], jax.Array]
Mining = Callable[[jax.Array, jax.Array, jax.Array, Hinge], jax.Array]


def _hinge(margin: float | jax.Array | None) -> Hinge:
    return jax.nn.softplus if margin is None else lambda gap: jax.nn.relu(gap + margin)


def _distance(squares: jax.Array, squared: bool) -> jax.Array:
    return squares if squared else root(squares)


def triplet(
    anchors: jax.Array,
    positives: jax.Array,
    negatives: jax.Array,
    *,
    margin: float | jax.Array | None = 0.2,
    squared: bool = False,
) -> jax.Array:
    """Computes max(0, d(a, p) − d(a, n) + margin) of given triples (Schroff et al. 2015, arXiv:1503.03832).

    Args:
      anchors: float [B, D], a. FaceNet brings all rows to length 1 first; nothing is done to them here.
      positives: float [B, D], p.
      negatives: float [B, D], n.
      margin: how much nearer the positive is to be; None for the soft margin log(1 + exp(d(a, p) − d(a, n))).
      squared: whether d is the square of the distance (FaceNet) or the distance itself.

    Returns:
      The loss [B], in at least float32. The gradient of distance 0 is 0.

    Raises:
      InputError: where the shapes differ.
    """
    if anchors.ndim != 2 or not anchors.shape == positives.shape == negatives.shape:
        raise InputError(
            f"anchors, positives and negatives must be embeddings [batch, dim] of one shape; got {anchors.shape}, "
            f"{positives.shape}, {negatives.shape}"
        )
    a, p, n = wide(anchors, positives, negatives)
    near, far = (_distance(jnp.sum(jnp.square(a - x), axis=-1), squared) for x in (p, n))
    return _hinge(margin)(near - far)


def batch_hard(distances: jax.Array, positive: jax.Array, negative: jax.Array, hinge: Hinge) -> jax.Array:
    """Takes each anchor's farthest positive and nearest negative (Hermans et al. 2017, arXiv:1703.07737).

    Args:
      distances: [B, B], of anchor i to example j.
      positive: booleans [B, B], which examples are of the anchor's class, the anchor not among them.
      negative: booleans [B, B], which are of another.
      hinge: the loss of d(a, p) − d(a, n).

    Returns:
      Values [B]; 0 for an anchor without a positive or a negative.
    """
    far, near = _farthest(distances, positive), _nearest(distances, negative)
    some = jnp.any(positive, axis=1) & jnp.any(negative, axis=1)
    return jnp.where(some, hinge(far - near), 0)


def batch_all(distances: jax.Array, positive: jax.Array, negative: jax.Array, hinge: Hinge) -> jax.Array:
    """Takes the mean over all triples of an anchor (Hermans et al. 2017), in time B³ and memory B².

    Arguments as of `batch_hard`. Anchors weigh alike, which is the paper's mean over all triples where the classes
    are of equal size.
    """

    @jax.checkpoint
    def anchor(row):
        d, p, n = row
        pairs = p[:, None] & n[None]
        return jnp.sum(jnp.where(pairs, hinge(d[:, None] - d[None]), 0)) / jnp.maximum(jnp.sum(pairs), 1)

    return jax.lax.map(anchor, (distances, positive, negative))


def semi_hard(distances: jax.Array, positive: jax.Array, negative: jax.Array, hinge: Hinge) -> jax.Array:
    """Takes for each positive the nearest negative beyond it, the farthest if there is none (Schroff et al. 2015).

    Arguments as of `batch_hard`; the value of an anchor is the mean over its positives. Time B³, memory B².
    """

    @jax.checkpoint
    def anchor(row):
        d, p, n = row
        beyond = n[None] & (d[None] > d[:, None])
        near = _nearest(jnp.broadcast_to(d[None], beyond.shape), beyond)
        chosen = jnp.where(jnp.any(beyond, axis=1), near, _farthest(d, n))
        pairs = p & jnp.any(n)
        return jnp.sum(jnp.where(pairs, hinge(d - chosen), 0)) / jnp.maximum(jnp.sum(pairs), 1)

    return jax.lax.map(anchor, (distances, positive, negative))


def _farthest(distances: jax.Array, among: jax.Array) -> jax.Array:
    """The largest [...] of distances [..., N] among those marked; of those that tie the first gets the gradient."""
    return pick(distances, jnp.argmax(jnp.where(among, jax.lax.stop_gradient(distances), -jnp.inf), axis=-1))


def _nearest(distances: jax.Array, among: jax.Array) -> jax.Array:
    return pick(distances, jnp.argmin(jnp.where(among, jax.lax.stop_gradient(distances), jnp.inf), axis=-1))


def mined_triplet(
    features: jax.Array,
    labels: jax.Array,
    *,
    margin: float | jax.Array | None = 0.2,
    mining: Mining = batch_hard,
    squared: bool = False,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes the triplet loss of each example as the anchor, over triples that `mining` finds in the batch.

    Distances are taken by differences, so that close rows keep their digits, in memory B². The gradient of distance 0
    is 0; of positives that are equally far, or negatives that are equally near, the first gets the gradient.

    Args:
      features: float [B, D].
      labels: integers [B], the classes.
      margin: as of `triplet`; None for the soft margin.
      mining: `batch_hard`, `batch_all`, `semi_hard` or a function like them.
      squared: whether distances are squared.
      mask: [B]; 0 leaves an example out.

    Returns:
      The loss [B], in at least float32; 0 for an anchor without a positive or a negative, which a mean over B counts.

    Raises:
      InputError: where the shapes do not fit.
    """
    hard = jnp.issubdtype(labels.dtype, jnp.integer)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not hard:
        raise InputError(
            f"features must be [batch, dim] and labels integers [batch]; got {features.shape} and {labels.dtype} "
            f"{labels.shape}"
        )
    keep = kept_rows(mask, len(features))
    (x,) = wide(features)
    x = jnp.where(keep[:, None], x, 0)
    pairs, same = keep[:, None] & keep[None], labels[:, None] == labels[None]
    other = ~jnp.eye(len(x), dtype=bool)
    return mining(_distance(squared_distances(x), squared), pairs & same & other, pairs & ~same, _hinge(margin))
