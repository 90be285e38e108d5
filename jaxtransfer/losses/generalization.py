"""Generalisation to unseen domains: how a classifier differs between the domains that it is trained on.

In `irm` and `gradient_variance` examples of a domain meet: `mask` [B] leaves rows out where it is 0 and weighs the
others, and `axis_name` tells over which axis the batch is split under `pmap` or `shard_map`; each device then gets the
value of the whole batch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_strength, wide
from jaxtransfer.losses.blockwise import numbers
from jaxtransfer.parts.masking import check_weights

_AT_ONCE = 16  # classes whose gradients are held together


def irm(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Computes ∂L_even/∂s · ∂L_odd/∂s at s = 1, with L the mean cross-entropy of the logits times s, a dummy scale.

    The penalty IRMv1 of invariant risk minimisation (Arjovsky et al. 2019, arXiv:1907.02893) for one domain. Their
    formula is the squared gradient, ‖∂L/∂s‖², whose estimate from a batch is biased upwards. This is the form released
    by them and in DomainBed: the product of the gradients on two halves of the batch, the rows of even and those of odd
    number, is an unbiased estimate, and may be negative. In closed form ∂Lᵢ/∂s = Σ_c (softmax(z)_c − q_c) z_c.

    Args:
      logits: float [B, C] of one domain, z.
      labels: integers [B] in [0, C), or probabilities [B, C], q.
      mask: [B].
      axis_name: see above; rows are even and odd by their number in the whole batch.

    Returns:
      A scalar, in at least float32; 0 where a half has no example, NaN for an integer label outside [0, C).

    Raises:
      InputError: where the shapes do not fit.
    """
    errors, (logits,), weights = _errors(logits, labels, mask, logits)
    slopes = jnp.sum(errors * jnp.where(jnp.isneginf(logits), 0, logits), axis=-1)
    odd = numbers(len(slopes), axis_name) % 2 == 1
    halves = jnp.stack([jnp.where(odd, 0, weights), jnp.where(odd, weights, 0)])
    totals = _everywhere(jnp.sum(halves * slopes[None], axis=1), axis_name)
    counts = _everywhere(jnp.sum(halves, axis=1), axis_name)
    means = jnp.where(counts == 0, 0, totals / jnp.where(counts == 0, 1, counts))
    return means[0] * means[1]


def vrex(values: jax.Array) -> jax.Array:
    """Computes (1/S) Σ_s (L_s − L̄)², the variance of the losses of S domains.

    (V-REx: Krueger et al. 2021, arXiv:2003.00688; DomainBed divides by S, too.)

    Args:
      values: float [S], the loss of each domain.

    Returns:
      A scalar, in at least float32; 0, with gradient 0, where all are equal.

    Raises:
      InputError: for what is no vector of one value or more.
    """
    (values,) = wide(_vector(values, "vrex"))
    return jnp.mean(jnp.square(values - jnp.mean(values)[None]))


def group_weights(weights: jax.Array, values: jax.Array, *, rate: float) -> jax.Array:
    """Computes q_s ∝ q_s · exp(η L_s), the step of exponentiated gradient ascent in the weights of S groups.

    Group DRO (Sagawa et al. 2020, arXiv:1911.08731): the weights lean to the groups whose loss is large. Nothing is
    differentiated through them. It is computed as a softmax, so that no loss is too large.

    Args:
      weights: float [S], q, not negative, not all 0; need not add up to 1.
      values: float [S], the losses.
      rate: η ≥ 0; 0.01 in the released codes.

    Returns:
      Weights [S] that add up to 1, in at least float32; a weight that is 0 stays 0.

    Raises:
      InputError: for vectors of other shapes, and a rate that is negative or not finite.
    """
    check_strength(rate, "rate")
    weights, values = wide(_vector(weights, "group_weights"), _vector(values, "group_weights"))
    if weights.shape != values.shape:
        raise InputError(f"group_weights takes a loss for each weight; got {weights.shape} and {values.shape}")
    return jax.lax.stop_gradient(jax.nn.softmax(jnp.log(weights) + rate * values))


def gradient_variance(
    features: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    *,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> dict[str, jax.Array]:
    """Computes Var_i(∂Lᵢ/∂W) and Var_i(∂Lᵢ/∂b), entry by entry, of a linear head z = Wᵀf + b under cross-entropy.

    What Fishr compares between domains (Rame et al. 2022, arXiv:2109.02934): the variance of the gradients of single
    examples, in closed form ∂Lᵢ/∂W = fᵢ (softmax(zᵢ) − qᵢ)ᵀ and ∂Lᵢ/∂b = softmax(zᵢ) − qᵢ. The gradients are centred,
    and the sum of squares divided by the number of examples, as in DomainBed. Sixteen classes at a time: memory
    16 · B · D, for derivatives too.

    Args:
      features: float [B, D] of one domain, f, what the head sees.
      logits: float [B, C], z.
      labels: integers [B] in [0, C), or probabilities [B, C], q.
      mask: [B].
      axis_name: see above.

    Returns:
      `{"kernel": [D, C], "bias": [C]}`, in at least float32; 0, with gradient 0, where all examples are one, and where
      none counts.

    Raises:
      InputError: where the shapes do not fit.
    """
    if features.ndim != 2 or features.shape[0] != logits.shape[0]:
        raise InputError(
            f"features must be [batch, dimensions] of the examples of the logits {logits.shape}; got {features.shape}"
        )
    errors, (features,), weights = _errors(logits, labels, mask, features)
    count = _everywhere(jnp.sum(weights), axis_name)
    shares = weights / jnp.where(count == 0, 1, count)

    def mean(rows):
        return _everywhere(jnp.einsum("bc,bd->cd", errors * shares[:, None], rows, precision=EXACT), axis_name)

    def spread(column):
        error, centre = column  # of one class, [B] and [D]
        rest = error[:, None] * features - centre[None]
        return jnp.sum(shares[:, None] * jnp.square(rest), axis=0)

    pairs = (errors.T, mean(features))
    kernel = jax.lax.map(jax.checkpoint(spread), pairs, batch_size=min(_AT_ONCE, errors.shape[1]))
    rest = errors - mean(jnp.ones((len(errors), 1), errors.dtype)).T
    bias = jnp.sum(shares[:, None] * jnp.square(rest), axis=0)
    return {"kernel": _everywhere(kernel, axis_name).T, "bias": _everywhere(bias, axis_name)}


def fishr(variances: Mapping[str, jax.Array]) -> jax.Array:
    """Computes (1/S) Σ_s ‖v_s − v̄‖² / n, how far the gradient variances of S domains are from their mean.

    (Rame et al. 2022, arXiv:2109.02934. The paper has the plain squared norm; divided by n, the number of entries, as
    here, it is the form released in DomainBed.)

    Args:
      variances: arrays [S, ...] by name, those of `gradient_variance` of each domain, stacked.

    Returns:
      A scalar, in at least float32; 0, with gradient 0, where all domains are alike.

    Raises:
      InputError: for no arrays, and for those of several numbers of domains.
    """
    leaves = jax.tree.leaves(variances)
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        raise InputError(f"fishr takes arrays [domains, ...] of one number of domains; got {sorted(sizes)}")
    leaves = wide(*leaves)
    entries = sum(leaf[0].size for leaf in leaves)
    total = sum(jnp.sum(jnp.square(leaf - jnp.mean(leaf, axis=0, keepdims=True))) for leaf in leaves)
    return jnp.asarray(total) / (entries * leaves[0].shape[0])


def _errors(logits: jax.Array, labels: jax.Array, mask: jax.Array | None, rows: jax.Array):
    """Returns softmax(z) − q [B, C], `rows` and the weights of the examples [B]; zeros where the mask is 0."""
    hard = jnp.issubdtype(labels.dtype, jnp.integer)
    if logits.ndim != 2 or labels.shape != (logits.shape[:1] if hard else logits.shape):
        raise InputError(
            f"expected logits [batch, classes] and labels, integers [batch] or probabilities [batch, classes]; got "
            f"{logits.shape} and {labels.dtype} {labels.shape}"
        )
    logits, rows = wide(logits, rows)
    weights = jnp.ones(len(logits), logits.dtype)
    if mask is not None:
        if mask.shape != weights.shape:
            raise InputError(f"mask must have one entry per example, {weights.shape}; got {mask.shape}")
        check_weights(mask)
        weights = mask.astype(logits.dtype)
    kept = weights[:, None] > 0
    logits, rows = jnp.where(kept, logits, 0), jnp.where(kept, rows, 0)
    target = labels
    if hard:
        target = (labels[:, None] == jnp.arange(logits.shape[1])[None]).astype(logits.dtype)
        known = (labels >= 0) & (labels < logits.shape[1])
        target = jnp.where(known[:, None], target, jnp.nan)
    errors = jax.nn.softmax(logits, axis=-1) - target.astype(logits.dtype)
    return jnp.where(kept, errors, 0), (rows,), weights


def _everywhere(total: jax.Array, axis_name: str | None) -> jax.Array:
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _vector(values: jax.Array, what: str) -> jax.Array:
    values = jnp.asarray(values)
    if values.ndim != 1 or not len(values):
        raise InputError(f"{what} takes one value for each domain, [S]; got shape {values.shape}")
    return values
