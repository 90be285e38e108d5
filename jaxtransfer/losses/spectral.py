"""Squared singular values of a batch's features; shrinkage, in which the weakest directions are made weaker."""

import functools

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, kept_rows, wide


def bss(features: jax.Array, *, k: int = 1, mask: jax.Array | None = None) -> jax.Array:
    """Computes Σ_{i ≤ k} σ_{−i}(F)², the k smallest squared singular values of a batch's features.

    (Chen et al. 2019, NeurIPS: "Catastrophic forgetting meets negative transfer". They take k = 1 and a weight of
    0.001.) Directions in which features of the target hardly vary are those that don't transfer; they are shrunk, the
    others left alone. F has min(B, D) singular values. Derivatives don't divide by the gaps between them: repeated
    ones and zeros do no harm. Only between the k-th smallest and the next one the gradient jumps, where they are equal.

    Args:
      features: float [B, D], all rows of the batch: the value is of all together.
      k: how many, at least 1 and at most min(B, D).
      mask: [B]; rows where it is 0 are left out, and with fewer than k rows left all values count.

    Returns:
      A scalar, in at least float32.

    Raises:
      InputError: for what is no matrix, and for k out of range.
    """
    if features.ndim != 2:
        raise InputError(f"bss takes features [batch, dimensions]; got shape {features.shape}")
    if not 1 <= k <= min(features.shape):
        raise InputError(f"k must be in [1, {min(features.shape)}], the singular values of {features.shape}; got {k}")
    (features,) = wide(features)
    keep = kept_rows(mask, len(features))
    features = jnp.where(keep[:, None], features, 0)
    known = jnp.minimum(jnp.sum(keep), features.shape[1])  # the values beyond are those of the rows left out
    return squared_singular_values(features, known - k, known)


def _chosen(singular, first, last):
    """Which of the singular values [r], from the largest on, have a place from `first` to before `last`; 0 or 1."""
    place = jnp.arange(singular.shape[0])
    return ((place >= first) & (place < last)).astype(singular.dtype)


@jax.custom_jvp
def squared_singular_values(features: jax.Array, first: jax.typing.ArrayLike, last: jax.typing.ArrayLike) -> jax.Array:
    """Computes Σ σᵢ(F)² over the places first ≤ i < last, counted from the largest one; derivatives divide by no gap.

    Args:
      features: F, float [B, D], in the type of the result.
      first: the first place, 0 for the largest; an integer, which may be traced.
      last: the place after the last one.
    """
    singular = jnp.linalg.svd(features, full_matrices=False, compute_uv=False)
    return jnp.sum(_chosen(singular, first, last) * jnp.square(singular))


@squared_singular_values.defjvp
def _squared_singular_values_jvp(primals, tangents):
    """d Σ σ² = 2 ⟨F_k, dF⟩ with F_k = Σ σᵢ uᵢ vᵢᵀ, the part of F in the directions chosen, whose basis is free."""
    return squared_singular_values(*primals), 2 * jnp.sum(_part(*primals) * tangents[0])


@jax.custom_jvp
def squared_largest(features: jax.Array, k: jax.typing.ArrayLike) -> jax.Array:
    """Computes Σ_{i ≤ k} σᵢ(F)², the k largest, as eigenvalues of the smaller one of F Fᵀ and Fᵀ F.

    Rounding is relative to σ₁², which the sum holds, so that nothing is lost by the squares as it would be for small
    values; a singular value decomposition takes fifteen times as long on a CPU (64 × 256).

    Args:
      features: F, float [B, D], in the type of the result.
      k: how many; an integer, which may be traced.
    """
    squares, _ = _eigen(features)
    return jnp.sum(_chosen(squares, 0, k) * squares)


@squared_largest.defjvp
def _squared_largest_jvp(primals, tangents):
    return squared_largest(*primals), 2 * jnp.sum(_largest_part(*primals) * tangents[0])


def _eigen(features):
    """Returns eigenvalues [r], from the largest on and none below zero, and vectors [·, r] of the smaller product."""
    wide = features if features.shape[0] <= features.shape[1] else features.T
    squares, vectors = jnp.linalg.eigh(jnp.matmul(wide, wide.T, precision=EXACT))
    return jax.nn.relu(squares[::-1]), vectors[:, ::-1]


@jax.custom_jvp
def _largest_part(features, k):
    squares, vectors = _eigen(features)
    vectors = vectors * _chosen(squares, 0, k)[None]
    onto = jnp.matmul(vectors, vectors.T, precision=EXACT)
    if features.shape[0] <= features.shape[1]:
        return jnp.matmul(onto, features, precision=EXACT)
    return jnp.matmul(features, onto, precision=EXACT)


@_largest_part.defjvp
def _largest_part_jvp(primals, tangents):
    """It is `_part`, whose derivative takes the decomposition itself."""
    features, k = primals
    _, moved = _part_jvp((features, 0, k), (tangents[0], None, None))
    return _largest_part(*primals), moved


@jax.custom_jvp
def _part(features, first, last):
    u, singular, vt = jnp.linalg.svd(features, full_matrices=False)
    return jnp.matmul(u * (_chosen(singular, first, last) * singular)[None], vt, precision=EXACT)


@_part.defjvp
def _part_jvp(primals, tangents):
    """Daleckii–Krein for singular values: divided differences of σ ↦ σ·[chosen], 0 or 1 within either group."""
    features, first, last = primals
    change = tangents[0]
    u, singular, vt = jnp.linalg.svd(features, full_matrices=False)
    chosen = _chosen(singular, first, last)
    values = chosen * singular
    same = chosen[:, None] == chosen[None]
    gap = singular[:, None] - singular[None]
    total = singular[:, None] + singular[None]
    between = jnp.where(gap == 0, 0, (values[:, None] - values[None]) / jnp.where(gap == 0, 1, gap))
    across = jnp.where(total == 0, 0, (values[:, None] + values[None]) / jnp.where(total == 0, 1, total))
    between, across = (jnp.where(same, chosen[:, None], one) for one in (between, across))

    product = functools.partial(jnp.matmul, precision=EXACT)
    inner = product(product(u.T, change), vt.T)
    even, odd = (inner + inner.T) / 2, (inner - inner.T) / 2
    moved = product(product(u, between * even + across * odd), vt)
    left, right = product(u * chosen[None], u.T), product(vt.T * chosen[None], vt)
    rows = product(change - product(u, product(u.T, change)), right)  # what leaves the span of u, and of v
    columns = product(left, change - product(product(change, vt.T), vt))
    return _part(*primals), moved + rows + columns
