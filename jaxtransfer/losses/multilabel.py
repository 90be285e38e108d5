"""Losses and scores over logits of labels that may hold together, each or none."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxtransfer.errors import InputError


def binary_cross_entropy(
    logits: jax.Array, targets: ArrayLike, *, label_smoothing: float = 0.0, pos_weight: ArrayLike | None = None
) -> jax.Array:
    """Computes −(1/L) Σ_l [p_l q_l log σ(x_l) + (1 − q_l) log(1 − σ(x_l))] with q = (1−ε)·target + ε/2.

    From the logits, so that no probability rounds to 0 or 1. The mean over a batch is PyTorch's
    `BCEWithLogitsLoss(pos_weight=)`.

    Args:
      logits: x, float [B, L].
      targets: 0 or 1, or probabilities, [B, L]; numbers or booleans.
      label_smoothing: ε in [0, 1).
      pos_weight: p, of the positives of each label [L]; ones without. Negatives / positives balances a label.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the shapes do not fit.
    """
    targets = _check(logits, targets)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    positive = (1 - label_smoothing) * targets.astype(dtype) + label_smoothing / 2
    negative = 1 - positive
    if pos_weight is not None:
        if np.shape(pos_weight) != logits.shape[-1:]:
            raise InputError(
                f"pos_weight must have one entry for each of the {logits.shape[-1]} labels; got shape "
                f"{np.shape(pos_weight)}"
            )
        positive = positive * jnp.asarray(pos_weight, dtype)[None]
    return jnp.mean(_times(positive, jax.nn.softplus(-logits)) + _times(negative, jax.nn.softplus(logits)), axis=-1)


def answers_right(logits: jax.Array, targets: ArrayLike) -> jax.Array:
    """Returns 1 for each label that is answered rightly, as there where its logit is above 0, else 0; NaN is wrong.

    Args:
      logits: float [B, L].
      targets: 0 or 1 [B, L]; probabilities count as there above ½.

    Returns:
      float32 [B, L]; its mean is 1 − the Hamming loss.

    Raises:
      InputError: where the shapes do not fit.
    """
    targets = _check(logits, targets)
    right = (logits > 0) == (targets.astype(jnp.float32) > 0.5)
    return (right & ~jnp.isnan(logits)).astype(jnp.float32)


def _times(share: jax.Array, loss: jax.Array) -> jax.Array:
    """share · loss, where 0 · ∞ = 0: a logit of ±∞ that is right costs nothing."""
    nothing = (share == 0) & jnp.isposinf(loss)
    return share * jnp.where(nothing, 0, loss)


def _check(logits: jax.Array, targets: ArrayLike) -> jax.Array:
    targets = jnp.asarray(targets)
    if jnp.ndim(logits) != 2 or targets.shape != logits.shape:
        raise InputError(
            f"logits and targets must be [batch, labels], a target of 0 or 1 for each label; got {jnp.shape(logits)} "
            f"and {targets.dtype} {targets.shape}"
        )
    return targets
