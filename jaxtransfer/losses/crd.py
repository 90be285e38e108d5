"""Contrastive representation distillation against a memory of every training example."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_same, check_share, check_temperature, kept_rows, normalize, wide


class CRDMemory(NamedTuple):
    """What `crd` remembers from batch to batch.

    Attributes:
      student: float [N, D], the running embedding of each training example by the student.
      teacher: float [N, D], the same by the teacher.
      student_norm: a scalar, the constant Z of the student's scores; 0 until the first batch sets it.
      teacher_norm: a scalar, the constant Z of the teacher's scores, alike.
    """

    student: jax.Array
    teacher: jax.Array
    student_norm: jax.Array
    teacher_norm: jax.Array


def crd_memory(key: jax.Array, examples: int, dim: int) -> CRDMemory:
    """Draws a memory for `crd`, uniform in ±1/√(dim/3), so that rows have a length near 1; both norms unset.

    Args:
      key: a random key.
      examples: N, the number of training examples.
      dim: D, the number of dimensions of the embeddings.

    Returns:
      A `CRDMemory` in float32.
    """
    bound = 1 / math.sqrt(dim / 3)
    student, teacher = (
        jax.random.uniform(part, (examples, dim), jnp.float32, -bound, bound) for part in jax.random.split(key)
    )
    unset = jnp.zeros((), jnp.float32)
    return CRDMemory(student, teacher, unset, unset)


def _contrast(scores: jax.Array, constant: jax.Array, examples: int, eps: float, keep: jax.Array):
    """Returns the contrastive loss [B] of scores [B, 1 + K], the first of each row the right one, and the constant Z.

    −log h₀ − Σ_k log(1 − h_k) with h = P/(P + K/N + ε) and P = e^score/Z; 1 − h has K/N above, as released.
    """
    draws = scores.shape[1] - 1
    count = jnp.sum(keep).astype(scores.dtype)
    sums = jax.nn.logsumexp(jax.lax.stop_gradient(scores), axis=1, where=keep[:, None])
    first = jax.nn.logsumexp(sums, where=keep) + jnp.log(examples / (jnp.maximum(count, 1) * (draws + 1)))
    first = jnp.where(count > 0, first, 0)
    unset = constant <= 0
    log_z = jnp.where(unset, first, jnp.log(jnp.where(unset, 1, constant)))
    noise = draws / examples
    odds = scores - log_z - jnp.log(noise + eps)
    wrong = jax.nn.softplus(odds[:, 1:]) + jnp.log1p(eps / noise)
    limits = jnp.finfo(constant.dtype)
    constant = jnp.where(unset & (count > 0), jnp.clip(jnp.exp(log_z), limits.tiny, limits.max), constant)
    return jax.nn.softplus(-odds[:, 0]) + jnp.sum(wrong, axis=1), constant


def crd(
    student: jax.Array,
    teacher: jax.Array,
    memory: CRDMemory,
    index: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
    eps: float = 1e-7,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, CRDMemory]:
    """Computes the contrast of the student with the teacher's memory plus that of the teacher with the student's.

    Contrastive representation distillation (Tian et al. 2020, arXiv:1910.10699), as released: with the scores
    P = exp(x·m/τ)/Z of an embedding x and rows m of the other network's memory, m₀ of its own example and m_k of K
    others, each contrast is −log P₀/(P₀ + K/N + ε) − Σ_k log (K/N)/(P_k + K/N + ε). Z is N times the mean of
    exp(x·m/τ) over the first batch and stays. Afterwards the rows of the batch's examples become the normalised
    momentum · old + (1 − momentum) · new. No gradient flows into the memory or Z.

    Args:
      student: float [B, D] embeddings; they are normalised here, as the embedding heads of the released code do.
      teacher: float [B, D] embeddings of the same examples, alike (their head learns too).
      memory: of N examples, such as `crd_memory` draws.
      index: integers [B] in [0, N), which training example each row is. Which of two rows with one index is kept in
        the memory is not specified.
      negatives: integers [B, K] in [0, N), K ≥ 1; the released code draws 16384, uniformly, its own index included.
      temperature: τ > 0.
      momentum: the share of the old row in the memory.
      eps: ε of the released code.
      mask: [B]; 0 leaves an example out of the loss, of Z and of the memory.

    Returns:
      The loss [B], in at least float32, 0 where left out, NaN where an index is outside [0, N); and the new memory.

    Raises:
      InputError: where the shapes do not fit, τ isn't positive or the momentum not in [0, 1].
    """
    check_same(student, teacher, "embeddings [batch, dim]", 2)
    check_temperature(temperature)
    check_share(momentum)
    batch, dim = student.shape
    examples = len(memory.student)
    if memory.student.shape != (examples, dim) or memory.teacher.shape != (examples, dim):
        raise InputError(
            f"memory must be two arrays [examples, {dim}] for embeddings {student.shape}; got {memory.student.shape} "
            f"and {memory.teacher.shape}: draw it by crd_memory(key, examples, {dim})"
        )
    if index.shape != (batch,) or negatives.ndim != 2 or len(negatives) != batch or not negatives.shape[1]:
        raise InputError(
            f"index must be [batch] and negatives [batch, at least 1], batch {batch}; got {index.shape} and "
            f"{negatives.shape}"
        )
    keep = kept_rows(mask, batch)
    s, t, s_rows, t_rows = wide(student, teacher, memory.student, memory.teacher)
    s, t = (normalize(jnp.where(keep[:, None], x, 0)) for x in (s, t))
    drawn = jnp.concatenate([index[:, None], negatives], axis=1)
    known = jnp.all((drawn >= 0) & (drawn < examples), axis=1)
    used = keep & known
    drawn = jnp.where(used[:, None], drawn, 0)

    def scores(x, rows):
        rows = jax.lax.stop_gradient(rows[drawn])
        return jnp.einsum("bd,bkd->bk", x, rows, precision=EXACT) / temperature

    by_student, student_norm = _contrast(scores(s, t_rows), memory.student_norm, examples, eps, used)
    by_teacher, teacher_norm = _contrast(scores(t, s_rows), memory.teacher_norm, examples, eps, used)
    values = jnp.where(keep, jnp.where(known, by_student + by_teacher, jnp.nan), 0)

    def moved(old, rows, x):
        new = normalize(momentum * rows[drawn[:, 0]] + (1 - momentum) * jax.lax.stop_gradient(x)).astype(old.dtype)
        return old.at[jnp.where(used, drawn[:, 0], examples)].set(new, mode="drop")

    norms = (new.astype(old.dtype) for new, old in zip((student_norm, teacher_norm), memory[2:], strict=True))
    new = CRDMemory(moved(memory.student, s_rows, s), moved(memory.teacher, t_rows, t), *norms)
    return values, jax.lax.stop_gradient(new)
