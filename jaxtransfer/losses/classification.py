"""Losses and scores over class logits."""

import jax
import jax.numpy as jnp

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


def cross_entropy(logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """Computes −Σ_c q_c log softmax(logits)_c with q = (1−ε)·target + ε/C (Szegedy et al. 2016, arXiv:1512.00567).

    Args:
      logits: float [B, C].
      labels: integers [B] in [0, C), or probabilities [B, C] (mixup, soft labels).
      label_smoothing: ε in [0, 1).

    Returns:
      The loss [B], in at least float32; NaN for an integer label outside [0, C), rather than a silently clamped one.

    Raises:
      InputError: where the shapes do not fit.
    """
    hard = _check(logits, labels)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    classes = logits.shape[-1]
    given = labels[:, None] == jnp.arange(classes)[None] if hard else labels
    target = (1 - label_smoothing) * given.astype(dtype) + label_smoothing / classes
    scores = jax.nn.log_softmax(logits.astype(dtype), axis=-1)
    scores = jnp.where(jnp.isneginf(scores) & (target == 0), 0, scores)  # 0 · log 0 = 0: a class that is ruled out
    values = -jnp.sum(target * scores, axis=-1)
    return jnp.where(jnp.any(given, axis=-1), values, jnp.nan) if hard else values


def top_k(logits: jax.Array, labels: jax.Array, *, k: int = 1) -> jax.Array:
    """Returns 1 where the true class is among the k largest logits, else 0.

    A tie counts for the class of the lower index. Soft labels count as their most probable class.

    Args:
      logits: float [B, C].
      labels: integers [B] or probabilities [B, C].
      k: how many guesses each example has.

    Returns:
      float32 [B].
    """
    hard = labels if _check(logits, labels) else jnp.argmax(labels, axis=-1)
    if k == 1:
        return (jnp.argmax(logits, axis=-1) == hard).astype(jnp.float32)
    guesses = jax.lax.top_k(logits, k)[1]
    return jnp.any(guesses == hard[:, None], axis=-1).astype(jnp.float32)
