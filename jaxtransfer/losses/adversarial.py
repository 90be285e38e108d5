"""Losses of adversaries: what features are to deceive, a domain discriminator or a second classifier."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_share, check_strength, kept_rows, wide
from jaxtransfer.losses.classification import cross_entropy
from jaxtransfer.losses.spectral import squared_largest

OFFSET = 1e-6  # added to a probability under a logarithm, as released


def gradient_reversal(x: jax.Array, coefficient: jax.typing.ArrayLike = 1.0) -> jax.Array:
    """Returns x, to the bit; its derivative is −coefficient instead of 1 (Ganin et al. 2016, arXiv:1505.07818).

    What is computed from the result learns to lower a loss, what x was computed from learns to raise it, in one update:
    `domain_loss(discriminator(gradient_reversal(features, coefficient)))`. Derivatives of any order and mode pass
    through; the derivative by the coefficient is 0.

    Args:
      x: float, any shape.
      coefficient: λ, a number or a scalar array, which may be traced: a schedule of the step.

    Raises:
      InputError: for an x that is no float, and a coefficient that is no scalar.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise InputError(f"only floats have a gradient to reverse; got {jnp.result_type(x)}")
    if jnp.shape(coefficient) != ():
        raise InputError(f"the coefficient of a gradient reversal is a scalar; got shape {jnp.shape(coefficient)}")
    (coefficient,) = wide(jnp.asarray(coefficient))
    return _reversed(jnp.asarray(x), coefficient)


@jax.custom_jvp
def _reversed(x, coefficient):
    """The identity. A formula, −λx + sg((1 + λ)x), would round it, and make NaN of infinity."""
    return x


@_reversed.defjvp
def _reversed_jvp(primals, tangents):
    x, coefficient = primals
    return _reversed(x, coefficient), (-coefficient * tangents[0]).astype(x.dtype)


def classifier_discrepancy(p1: jax.Array, p2: jax.Array) -> jax.Array:
    """Computes (1/C) Σ_c |p1_c − p2_c|, how far two classifiers disagree (Saito et al. 2018, arXiv:1712.02560).

    The gradient is 0 where they agree.

    Args:
      p1: probabilities [B, C] of one classifier, after the softmax.
      p2: of the other.

    Returns:
      The discrepancy [B], in at least float32; the paper's and the released one is its mean.

    Raises:
      InputError: where the shapes are not [B, C], both.
    """
    if p1.ndim != 2 or p1.shape != p2.shape:
        raise InputError(f"two classifiers' probabilities must be [batch, classes], both; got {p1.shape}, {p2.shape}")
    p1, p2 = wide(p1, p2)
    apart = p1 - p2
    return jnp.mean(apart * jax.lax.stop_gradient(jnp.sign(apart)), axis=-1)  # |0| has the slope 1 in JAX


def mdd(
    source: jax.Array,
    source_adversarial: jax.Array,
    target: jax.Array,
    target_adversarial: jax.Array,
    *,
    margin: float = 4.0,
    source_mask: jax.Array | None = None,
    target_mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the margin disparity discrepancy −γ mean_s CE(f'(s), h(s)) + mean_t log(1 − σ(f'(t))_h(t)).

    (Zhang et al. 2019, arXiv:1904.05801.) h is the class that the classifier predicts, f' the adversarial classifier's
    logits, σ the softmax. The adversary *raises* it: it agrees with the classifier on the source and disagrees on the
    target; features that lower it leave it no room to. A loss to minimise, behind a gradient reversal, is −mdd(...).

    As released, the logarithm is log(min(1 − p + 10⁻⁶, 1)), in the paper it has no offset. No gradient reaches the
    classifier's logits, of which the argmax alone is read. Where the released code pairs the rows of two batches of
    one size, these are means of each domain by itself.

    Args:
      source: the classifier's logits on the source, float [B, C].
      source_adversarial: the adversary's, [B, C].
      target: the classifier's logits on the target, [M, C]; M may differ from B.
      target_adversarial: the adversary's, [M, C].
      margin: γ ≥ 0.
      source_mask: [B]; 0 leaves an example out.
      target_mask: [M].
      axis_name: of the axis over which the batches are split under `pmap`.

    Returns:
      A scalar, in at least float32; a domain without examples adds nothing.

    Raises:
      InputError: where the shapes do not fit, or the margin is negative or not finite.
    """
    check_strength(margin, "margin")
    _check_pair(source, source_adversarial)
    _check_pair(target, target_adversarial)
    near = disparity_on_source(source, _kept(source_adversarial, source_mask))
    far = disparity_on_target(target, _kept(target_adversarial, target_mask))
    return _mean(far, target_mask, axis_name) - margin * _mean(near, source_mask, axis_name)


def disparity_on_source(logits: jax.Array, adversarial: jax.Array) -> jax.Array:
    """Computes the cross-entropy [B] of the adversary with what the classifier predicts."""
    return cross_entropy(adversarial, jnp.argmax(logits, axis=-1))


def disparity_on_target(logits: jax.Array, adversarial: jax.Array) -> jax.Array:
    """Computes log(min(1 − p + 10⁻⁶, 1)) [M], p the adversary's probability of what the classifier predicts."""
    own = jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(logits.shape[-1])[None]
    (adversarial,) = wide(adversarial)
    others = jnp.sum(jnp.where(own, 0, jax.nn.softmax(adversarial, axis=-1)), axis=-1)  # 1 − p would cancel digits
    shifted = others + OFFSET
    return jnp.where(shifted < 1, jnp.log(jnp.where(shifted < 1, shifted, 1)), 0)


def open_set(logits: jax.Array, *, threshold: float = 0.5) -> jax.Array:
    """Computes −t log p − (1 − t) log(1 − p), p the probability of the last class, that of the unknown.

    (Saito et al. 2018, arXiv:1804.10427.) Least where p = t; features behind a gradient reversal leave it, to either
    side. As released, both logarithms are of p + 10⁻⁶ and 1 − p + 10⁻⁶.

    Args:
      logits: float [B, C + 1].
      threshold: t, in [0, 1].

    Returns:
      The loss [B], in at least float32; the released one is its mean.

    Raises:
      InputError: for what is no [B, 2] or wider, and t out of range.
    """
    check_share(threshold, "threshold")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f"logits must be [batch, known classes + 1 for the unknown]; got {logits.shape}")
    (logits,) = wide(logits)
    p = jax.nn.softmax(logits, axis=-1)
    known = jnp.sum(p[:, :-1], axis=-1)
    return -threshold * jnp.log(p[:, -1] + OFFSET) - (1 - threshold) * jnp.log(known + OFFSET)


def bsp(
    source: jax.Array,
    target: jax.Array,
    *,
    k: int = 1,
    source_mask: jax.Array | None = None,
    target_mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes Σ_{i ≤ k} σᵢ(F_s)² + σᵢ(F_t)², the k largest squared singular values of each domain's features.

    (Chen et al. 2019, ICML: "Transferability vs. discriminability: batch spectral penalization for adversarial domain
    adaptation". They take k = 1 and a weight of 10⁻⁴; the released code 2 · 10⁻⁴.) Adversaries align the strongest
    directions first and let the others, which tell classes apart, wither; penalised, the strong ones leave them room.
    Singular values are those of the features as they are, not centred, as released. Derivatives don't divide by the
    gaps between them: repeated ones and zeros do no harm. Only between the k-th largest and the next one the gradient
    jumps, where they are equal.

    Args:
      source: float [B, D], all rows of the batch.
      target: float [M, D].
      k: how many, at least 1 and at most min(B, M, D).
      source_mask: [B]; rows where it is 0 are left out, and with fewer than k rows left all values count.
      target_mask: [M].
      axis_name: of the axis over which the batches are split under `pmap`; k then counts on the rows of all devices.

    Returns:
      A scalar, in at least float32.

    Raises:
      InputError: for what is no two matrices of one width, and for k out of range.
    """
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise InputError(
            f"bsp takes features [batch, dimensions] of two domains, of one width; got {source.shape}, {target.shape}"
        )
    source, target = wide(source, target)
    total = jnp.zeros((), source.dtype)
    for rows, mask in ((source, source_mask), (target, target_mask)):
        keep = kept_rows(mask, len(rows))
        rows = _kept(rows, mask)
        if axis_name is not None:
            rows, keep = jax.lax.all_gather((rows, keep), axis_name, tiled=True)
        if not 1 <= k <= min(rows.shape):
            raise InputError(f"k must be in [1, {min(rows.shape)}], the singular values of {rows.shape}; got {k}")
        total = total + squared_largest(rows, jnp.minimum(k, jnp.sum(keep)))
    return total


def _check_pair(logits: jax.Array, adversarial: jax.Array) -> None:
    if logits.ndim != 2 or logits.shape != adversarial.shape:
        raise InputError(
            f"a classifier and its adversary give logits [batch, classes] of one shape; got {logits.shape}, "
            f"{adversarial.shape}"
        )


def _kept(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the rows [B, D] with zeros where the mask is 0."""
    return jnp.where(kept_rows(mask, len(rows))[:, None], rows, 0)


def _mean(values: jax.Array, mask: jax.Array | None, axis_name: str | None) -> jax.Array:
    keep = kept_rows(mask, len(values))
    total, count = jnp.sum(jnp.where(keep, values, 0)), jnp.sum(keep).astype(values.dtype)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)
