"""Self-supervised losses without negatives: two views agree while the dimensions stay spread and uncorrelated."""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, centre, check_strength, check_temperature, kept_rows, wide


def _centred(z1: jax.Array, z2: jax.Array, mask: jax.Array | None):
    """Returns both views, and both less their means, 0 where left out, and how many are kept."""
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise InputError(f"the two views must be embeddings [batch, dim] of one shape; got {z1.shape} and {z2.shape}")
    keep = kept_rows(mask, len(z1))[:, None]
    views = tuple(jnp.where(keep, z, 0) for z in wide(z1, z2))
    return views, tuple(centre(z, axis=0, keep=keep) for z in views), jnp.sum(keep).astype(views[0].dtype)


def barlow_twins(
    z1: jax.Array, z2: jax.Array, *, strength: float = 5e-3, eps: float = 1e-5, mask: jax.Array | None = None
) -> jax.Array:
    """Computes Σ_d (C_dd − 1)² + λ Σ_{d≠e} C_de², C = ẑ1ᵀ ẑ2 / B of standardised views (Zbontar et al. 2021).

    arXiv:2103.03230. As released, the standard deviation is that of batch norm: √(variance over B + ε).

    Args:
      z1: float [B, D].
      z2: float [B, D].
      strength: λ.
      eps: ε.
      mask: [B]; 0 leaves an example out.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: where the shapes do not fit, or a weight is negative or not finite.
    """
    check_strength(strength)
    check_strength(eps, "eps")
    _, rests, count = _centred(z1, z2, mask)
    variances = (jnp.sum(jnp.square(z), axis=0, keepdims=True) / jnp.maximum(count, 1) for z in rests)
    one, two = (z * jax.lax.rsqrt(variance + eps) for z, variance in zip(rests, variances, strict=True))
    products = jnp.matmul(one.T, two, precision=EXACT) / jnp.maximum(count, 1)
    own = jnp.eye(len(products), dtype=bool)
    loss = jnp.sum(jnp.where(own, jnp.square(products - 1), strength * jnp.square(products)))
    return jnp.where(count > 0, loss, 0)


def vicreg(
    z1: jax.Array,
    z2: jax.Array,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes λ mean (z1 − z2)² + μ ½ Σ_z mean_d max(0, 1 − std_d) + ν Σ_z Σ_{d≠e} cov_de² / D (Bardes et al. 2022).

    arXiv:2105.04906. As released: std_d = √(variance + ε), variance and covariance are over B − 1, and the variance has
    the ½, which the paper has not, while the covariance has none.

    Args:
      z1: float [B, D].
      z2: float [B, D].
      invariance: λ.
      variance: μ.
      covariance: ν.
      eps: ε > 0.
      mask: [B]; 0 leaves an example out.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: where the shapes do not fit, or a weight is negative or not finite.
    """
    for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        check_strength(weight, name)
    check_temperature(eps, "eps")
    (one, two), rests, count = _centred(z1, z2, mask)
    dim = one.shape[1]
    loss = invariance * jnp.sum(jnp.square(one - two)) / (jnp.maximum(count, 1) * dim)
    for z in rests:
        products = jnp.matmul(z.T, z, precision=EXACT) / jnp.maximum(count - 1, 1)
        spread = jnp.sqrt(jnp.sum(jnp.square(z), axis=0) / jnp.maximum(count - 1, 1) + eps)
        shared = jnp.where(jnp.eye(dim, dtype=bool), 0, products)
        loss += variance * jnp.mean(jax.nn.relu(1 - spread)) / 2 + covariance * jnp.sum(jnp.square(shared)) / dim
    return jnp.where(count > 0, loss, 0)
