"""Contrast of classes: a query is drawn to the keys of its class and told from those of the others."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_temperature, kept_rows, normalize, wide
from jaxtransfer.losses.blockwise import LOG_SUM_EXP, Side, reduce_pairs


def categorical_contrast(
    queries: jax.Array,
    positives: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    key_labels: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    chunk: int | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes −1/|P| Σ_{p ∈ P} log exp(q·p/τ) / [exp(q·q⁺/τ) + Σ_j exp(q·kⱼ/τ)], P = {q⁺} and the keys of q's class.

    Both losses of Bi-Tuning (Zhong et al. 2020, arXiv:2011.06182), on vectors that are brought to length 1 here. CCL:
    q is an example's projection, q⁺ that of the slow network, k its earlier ones. CCE: q are the classifier's weights
    of the example's class, q⁺ its feature, k earlier features of the slow network. The released `KLDivLoss` is less by
    log |P|, with the same gradient.

    Args:
      queries: float [B, D], q.
      positives: float [B, D], q⁺; row i belongs to row i of the queries.
      labels: integers [B] ≥ 0, the classes of the queries.
      keys: float [M, D], k, shared by all queries: a queue.
      key_labels: integers [M], their classes; a key whose label is negative isn't there, as in a queue that fills up.
      temperature: τ > 0.
      chunk: the largest side of a tile of the matrix of scores, which is never held; None chooses by size.
      mask: [B]; 0 leaves an example out.

    Returns:
      The loss [B], in at least float32; 0 where there are no keys, NaN for a negative label. Without keys of its class
      P is q⁺ alone.

    Raises:
      InputError: where the shapes do not fit, labels aren't integers, or τ isn't positive.
    """
    check_temperature(temperature)
    if queries.ndim != 2 or positives.shape != queries.shape or keys.ndim != 2 or keys.shape[1:] != queries.shape[1:]:
        raise InputError(
            f"queries and positives must be [batch, dim] of one shape, and keys [any, dim]; got {queries.shape}, "
            f"{positives.shape} and {keys.shape}"
        )
    for what, given, rows in (("labels", labels, queries), ("key_labels", key_labels, keys)):
        if given.shape != rows.shape[:1] or not jnp.issubdtype(given.dtype, jnp.integer):
            raise InputError(f"{what} must be integers ({len(rows)},); got {given.dtype} {given.shape}")
    if not len(keys):
        raise InputError("there must be a key or more; one that isn't there yet has a label of -1")
    keep, there = kept_rows(mask, len(queries)), key_labels >= 0
    q, own, k = wide(queries, positives, keys)
    q, own = (normalize(jnp.where(keep[:, None], x, 0)) for x in (q, own))
    k = normalize(jnp.where(there[:, None], k, 0))
    q = q / temperature
    own = jnp.sum(q * own, axis=1)
    sums, _ = reduce_pairs(LOG_SUM_EXP, Side(q, keep), Side(k, there), chunk=chunk)
    order = jnp.sort(key_labels)
    group, groups = (jnp.searchsorted(order, one) for one in (labels, key_labels))  # a number for each label
    group = jnp.minimum(group, len(keys) - 1)
    alike = order[group] == labels
    count = jnp.where(alike, jax.ops.segment_sum(there.astype(q.dtype), groups, len(keys))[group], 0)
    of_class = jnp.where(alike[:, None], jax.ops.segment_sum(k, groups, len(keys))[group], 0)
    right = (own + jnp.sum(q * of_class, axis=1)) / (1 + count)
    values = jnp.logaddexp(own, sums) - right
    return jnp.where(keep, jnp.where(labels < 0, jnp.nan, values), 0)
