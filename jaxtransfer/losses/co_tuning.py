"""Co-Tuning: the pretrained head goes on learning, from what the target's classes are in the source's words."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, wide


def co_tuning(source_logits: jax.Array, labels: jax.Array, relationship: jax.Array) -> jax.Array:
    """Computes KL(p(s | y) ‖ softmax(z)) per example, p(s | y) what class y is in the source's classes.

    (You et al. 2020, NeurIPS: "Co-tuning for transfer learning"; the authors' code takes the cross-entropy, which has
    the same gradient and is larger by the entropy of p(s | y).) Where labels are probabilities q, p = Σ_y q_y p(s | y).

    Args:
      source_logits: float [B, S], z, of the source's head on the features that train.
      labels: int [B], or probabilities [B, C].
      relationship: p(s | y) [C, S], rows that sum to 1: `jt.methods.direct_relationship`, `reverse_relationship`.

    Returns:
      The loss [B], in at least float32; NaN for an integer label outside [0, C).

    Raises:
      InputError: where shapes don't fit.
    """
    if jnp.ndim(relationship) != 2 or source_logits.ndim != 2 or source_logits.shape[1] != relationship.shape[1]:
        raise InputError(
            f"co_tuning takes source logits [B, S] and a relationship [C, S]; got {source_logits.shape} and "
            f"{jnp.shape(relationship)}"
        )
    rows, classes = source_logits.shape[0], relationship.shape[0]
    if labels.shape not in ((rows,), (rows, classes)):
        raise InputError(f"labels must be integers ({rows},) or probabilities ({rows}, {classes}); got {labels.shape}")
    source_logits, relationship = wide(source_logits, jnp.asarray(relationship))
    given = labels if labels.ndim == 2 else labels[:, None] == jnp.arange(classes)[None]
    target = jnp.matmul(given.astype(relationship.dtype), relationship, precision=EXACT)
    target = jax.lax.stop_gradient(target)
    some = target > 0
    log_target = jnp.log(jnp.where(some, target, 1))
    log_model = jax.nn.log_softmax(source_logits)
    values = jnp.sum(jnp.where(some, target * (log_target - log_model), 0), axis=-1)
    return values if labels.ndim == 2 else jnp.where(jnp.any(given, axis=-1), values, jnp.nan)
