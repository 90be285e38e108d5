"""Losses and scores over class logits."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxtransfer.errors import InputError


def _check(logits, labels):
    if jnp.ndim(logits) != 2:
        raise InputError(f"logits must be [batch, classes]; got shape {jnp.shape(logits)}")
    hard = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:1] if hard else logits.shape
    if labels.shape != expected:
        raise InputError(
            f"labels must be integers [batch] or probabilities [batch, classes]; for logits {logits.shape} expected "
            f"{expected}, got {labels.dtype} {labels.shape}"
        )
    return hard


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0, weight: ArrayLike | None = None
) -> jax.Array:
    """Computes −Σ_c w_c q_c log softmax(logits)_c with q = (1−ε)·target + ε/C (Szegedy et al. 2016, arXiv:1512.00567).

    The same as PyTorch's `cross_entropy(reduction="none")`; its weighted mean is Σ values / Σ `class_weights`.

    Args:
      logits: float [B, C].
      labels: integers [B] in [0, C), or probabilities [B, C] (mixup, soft labels).
      label_smoothing: ε in [0, 1).
      weight: w, of the classes [C]; ones without.

    Returns:
      The loss [B], in at least float32; NaN for an integer label outside [0, C), rather than a silently clamped one.

    Raises:
      InputError: where the shapes do not fit.
    """
    hard = _check(logits, labels)
    if weight is not None:
        _check_length(weight, logits)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    classes = logits.shape[-1]
    given = labels[:, None] == jnp.arange(classes)[None] if hard else labels
    target = (1 - label_smoothing) * given.astype(dtype) + label_smoothing / classes
    if weight is not None:
        target = target * jnp.asarray(weight, dtype)[None]
    scores = jax.nn.log_softmax(logits.astype(dtype), axis=-1)
    scores = jnp.where(jnp.isneginf(scores) & (target == 0), 0, scores)  # 0 · log 0 = 0: a class that is ruled out
    values = -jnp.sum(target * scores, axis=-1)
    return jnp.where(jnp.any(given, axis=-1), values, jnp.nan) if hard else values


def class_weights(logits: jax.Array, labels: jax.Array, weight: ArrayLike) -> jax.Array:
    """Computes Σ_c w_c target_c, how much each example counts by its class: what a weighted mean is divided by.

    Args:
      logits: float [B, C], for their shape.
      labels: integers [B] or probabilities [B, C].
      weight: w, of the classes [C].

    Returns:
      [B], in at least float32; w_y for an integer label y.

    Raises:
      InputError: where the shapes do not fit.
    """
    hard = _check(logits, labels)
    _check_length(weight, logits)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    target = labels[:, None] == jnp.arange(logits.shape[-1])[None] if hard else labels
    return jnp.sum(target.astype(dtype) * jnp.asarray(weight, dtype)[None], axis=-1)


def _check_length(weight, logits):
    if jnp.shape(weight) != logits.shape[-1:]:
        raise InputError(
            f"weight must have one entry for each of the {logits.shape[-1]} classes; got shape {jnp.shape(weight)}"
        )


def top_k(logits: jax.Array, labels: jax.Array, *, k: int = 1) -> jax.Array:
    """Returns 1 where the true class is among the k largest logits, else 0.

    A tie counts for the class of the lower index, and a true class whose logit is NaN is none of the k. Soft labels
    count as their most probable class.

    Args:
      logits: float [B, C].
      labels: integers [B] or probabilities [B, C].
      k: how many guesses each example has.

    Returns:
      float32 [B].
    """
    hard = labels if _check(logits, labels) else jnp.argmax(labels, axis=-1)
    if k == 1:
        known = ~jnp.isnan(jnp.max(logits, axis=-1))  # argmax finds what is no number, which is no hit for another k
        return (known & (jnp.argmax(logits, axis=-1) == hard)).astype(jnp.float32)
    # By counting what stands before the true class: to sort, XLA would gather rows that are split over devices.
    places = jnp.arange(logits.shape[-1])[None]
    true = places == hard[:, None]
    own = jnp.sum(jnp.where(true, logits, 0), axis=-1, keepdims=True)
    before = ~(logits <= own) | ((logits == own) & (places < hard[:, None]))  # what is no number stands before all
    return (jnp.any(true, axis=-1) & (jnp.sum(before, axis=-1) < k)).astype(jnp.float32)
