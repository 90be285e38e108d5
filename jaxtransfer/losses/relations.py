"""Distillation from how the examples of a batch relate: one scalar for the batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._distances import squared_distances
from jaxtransfer.losses._numerics import (
    EXACT,
    check_same,
    check_strength,
    check_temperature,
    kept_rows,
    norm,
    normalize,
    wide,
)


def _rows(student: jax.Array, teacher: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, ...]:
    """Returns flat features [B, D] and [B, D'] with 0 for what is left out, what is kept [B], and how many."""
    if student.ndim < 2 or teacher.ndim < 2 or student.shape[0] != teacher.shape[0]:
        raise InputError(
            f"student and teacher must be features [batch, ...] of the same examples; got student {student.shape}, "
            f"teacher {teacher.shape}"
        )
    keep = kept_rows(mask, student.shape[0])
    s, t = (
        jnp.where(keep[:, None], rows.reshape(rows.shape[0], -1), 0) for rows in wide(student, teacher)
    )  # fmt: skip
    return s, t, keep, jnp.sum(keep).astype(s.dtype)


def _pairs(keep: jax.Array) -> jax.Array:
    return keep[:, None] & keep[None, :]


def _gram(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y.T, precision=EXACT)


def _huber(difference: jax.Array) -> jax.Array:
    """Smooth L1: half the square up to 1, linear beyond."""
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(difference), size - 0.5)


def similarity_preserving(student: jax.Array, teacher: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Computes ‖G̃(s) − G̃(t)‖² / B², G = F Fᵀ of flat features, its rows of length 1 (Tung & Mori 2019).

    arXiv:1907.09682. Examples that the teacher finds alike are to be alike for the student.

    Args:
      student: float [B, ...].
      teacher: float [B, ...], of any other shape per example.
      mask: [B]; 0 leaves an example out, B counts the others.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: where the shapes do not fit.
    """
    s, t, _, count = _rows(student, teacher, mask)
    difference = normalize(_gram(s, s)) - normalize(_gram(t, t))
    return jnp.sum(jnp.square(difference)) / jnp.square(jnp.maximum(count, 1))


def gaussian_correlation(features: jax.Array, *, gamma: float = 0.4, order: int = 2) -> jax.Array:
    """Computes Σ_{p=0..P} e^{−2γ} (2γ)^p/p! (x·y)^p, the Taylor polynomial of the Gaussian kernel exp(−γ‖x − y‖²).

    The expansion holds between vectors of length 1 (‖x − y‖² = 2 − 2 x·y), so rows are normalised first. A kernel for
    `correlation_congruence`, with the paper's γ and P (Peng et al. 2019, arXiv:1904.01802).

    Args:
      features: float [B, D].
      gamma: γ, the inverse width.
      order: P, the degree of the polynomial.

    Returns:
      The kernel matrix [B, B], in at least float32.
    """
    check_strength(gamma, "gamma")
    (features,) = wide(features)
    rows = normalize(features)
    products = _gram(rows, rows)
    term = jnp.full_like(products, jnp.exp(-2 * gamma))
    total = term
    for p in range(1, order + 1):
        term = term * (2 * gamma / p) * products
        total = total + term
    return total


def correlation_congruence(
    student: jax.Array,
    teacher: jax.Array,
    *,
    kernel: Callable[[jax.Array], jax.Array] | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes mean_i Σ_d |s − t|_{i,d} |s − t|_{i+1,d}, or mean_ij (K(s)_ij − K(t)_ij)² with a kernel K.

    Correlation congruence (Peng et al. 2019, arXiv:1904.01802). The paper has the kernel form; the form without one,
    over neighbours in the batch, is what the authors gave out and what RepDistiller compares.

    Args:
      student: float [B, D] (or [B, ...], flattened).
      teacher: float of the student's shape; with a kernel D may differ.
      kernel: K, from features [B, D] to [B, B], such as `gaussian_correlation`.
      mask: [B]; 0 leaves an example out: those around it become neighbours.

    Returns:
      A scalar, in at least float32; 0 without two neighbours, or, with a kernel, without an example.

    Raises:
      InputError: where the shapes do not fit.
    """
    if kernel is None:
        check_same(student, teacher, "features [batch, ...]")
    s, t, keep, count = _rows(student, teacher, mask)
    if kernel is not None:
        difference = jnp.where(_pairs(keep), kernel(s) - kernel(t), 0)
        return jnp.sum(jnp.square(difference)) / jnp.square(jnp.maximum(count, 1))
    gap = jnp.abs(s - t)[jnp.argsort(~keep, stable=True)]  # those kept come first, the others are 0
    return jnp.sum(gap[:-1] * gap[1:]) / jnp.maximum(count - 1, 1)


def _distances(rows: jax.Array, keep: jax.Array) -> jax.Array:
    """Distances [B, B] over their mean: at least 1e-6 before it, 0 on the diagonal and for what is left out."""
    pairs = _pairs(keep) & ~jnp.eye(len(rows), dtype=bool)
    squares = squared_distances(jnp.where(keep[:, None], rows, 0))
    distances = jnp.where(pairs, jnp.sqrt(jnp.where(squares < 1e-12, 1e-12, squares)), 0)
    mean = jnp.sum(distances) / jnp.maximum(jnp.sum(pairs), 1).astype(rows.dtype)
    return distances / jnp.where(mean > 0, mean, 1)


def rkd_distance(student: jax.Array, teacher: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Computes mean_ij smoothL1(‖sᵢ − sⱼ‖/μ(s) − ‖tᵢ − tⱼ‖/μ(t)), μ the mean distance (Park et al. 2019).

    Relational knowledge distillation, arXiv:1904.05068. As released, the mean runs over all B² pairs, the diagonal
    with its zeros included, and distances are at least 1e-6 (with gradient 0 below).

    Args:
      student: float [B, ...].
      teacher: float [B, ...], of any other shape per example.
      mask: [B]; 0 leaves an example out.

    Returns:
      A scalar, in at least float32; 0 for fewer than two examples.

    Raises:
      InputError: where the shapes do not fit.
    """
    s, t, keep, count = _rows(student, teacher, mask)
    return jnp.sum(_huber(_distances(s, keep) - _distances(t, keep))) / jnp.square(jnp.maximum(count, 1))


def _angles(rows: jax.Array, keep: jax.Array) -> jax.Array:
    edges = jnp.where(_pairs(keep)[..., None], rows[None] - rows[:, None], 0)  # [j, i]: from j to i
    edges = normalize(edges)
    return jnp.einsum("jid,jkd->jik", edges, edges, precision=EXACT)


def rkd_angle(student: jax.Array, teacher: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Computes mean_ijk smoothL1(cos ∠ sᵢsⱼs_k − cos ∠ tᵢtⱼt_k) (Park et al. 2019, arXiv:1904.05068).

    As released, the mean runs over all B³ triples, those with i = j or k = j, whose cosine is 0, included. Memory grows
    with B² D and B³. Two equal examples have no direction between them: gradient 0.

    Args:
      student: float [B, ...].
      teacher: float [B, ...], of any other shape per example.
      mask: [B]; 0 leaves an example out.

    Returns:
      A scalar, in at least float32; 0 for fewer than two examples.

    Raises:
      InputError: where the shapes do not fit.
    """
    s, t, keep, count = _rows(student, teacher, mask)
    return jnp.sum(_huber(_angles(s, keep) - _angles(t, keep))) / jnp.maximum(count, 1) ** 3


def _neighbours(rows: jax.Array, keep: jax.Array, eps: float) -> jax.Array:
    """The probability [B, B] that j is a neighbour of i, proportional to (1 + cos)/2."""
    length = norm(rows)
    rows = jnp.where(length > 0, rows / (length + eps), 0)
    similarity = (_gram(rows, rows) + 1) / 2
    similarity = jnp.where(_pairs(keep) & (similarity > 0), similarity, 0)  # rounding may pass below 0
    total = jnp.sum(similarity, axis=1, keepdims=True)
    return similarity / jnp.where(total > 0, total, 1)


def pkt(student: jax.Array, teacher: jax.Array, *, eps: float = 1e-7, mask: jax.Array | None = None) -> jax.Array:
    """Computes mean_ij T_ij log((T_ij + ε)/(S_ij + ε)) of neighbour probabilities (Passalis & Tefas 2018).

    Probabilistic knowledge transfer, arXiv:1803.10837: S_ij = K(sᵢ, sⱼ) / Σ_j K(sᵢ, sⱼ) with K = (cos + 1)/2, T alike.
    The paper sums over pairs, without i = j; as released, the mean runs over all B² of them.

    Args:
      student: float [B, ...].
      teacher: float [B, ...], of any other shape per example.
      eps: ε, also added to the norms of the features.
      mask: [B]; 0 leaves an example out.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: where the shapes do not fit.
    """
    s, t, keep, count = _rows(student, teacher, mask)
    check_temperature(eps, "eps")
    s, t = _neighbours(s, keep, eps), _neighbours(t, keep, eps)
    return jnp.sum(t * (jnp.log(t + eps) - jnp.log(s + eps))) / jnp.square(jnp.maximum(count, 1))
