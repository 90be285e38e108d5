"""Distillation from the teacher's class distribution."""

import math

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import centre, check_same, check_strength, check_temperature, kept_rows, norm, wide


@jax.custom_jvp
def _remainder(u: jax.Array) -> jax.Array:
    """e^u − 1 − u for |u| < 10, without cancellation around 0, with the derivative e^u − 1."""
    series = jnp.zeros_like(u)
    for k in range(16, 1, -1):
        series = series * u + 1 / math.factorial(k)
    return jnp.where(jnp.abs(u) < 0.5, series * jnp.square(u), jnp.expm1(u) - u)


_remainder.defjvps(lambda change, _, u: jnp.expm1(u) * change)


def _difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a − b and what rounding took from it (Knuth's two-sum)."""
    rounded = a - b
    back = rounded - a
    lost = jax.lax.stop_gradient((a - (rounded - back)) - (b + back))
    return rounded, jnp.where(jnp.isfinite(lost), lost, 0)


def _align(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns both logits less their largest, and the gap between those, teacher − student.

    The gap is exact to rounding both for logits that almost agree and for logits whose heights are far apart.
    """
    s_top, t_top = (jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True)) for z in (student, teacher))
    s_top, t_top = (jnp.where(jnp.isfinite(top), top, 0) for top in (s_top, t_top))
    gap, lost = _difference(teacher, student)
    offset, more = _difference(t_top, s_top)
    return student - s_top, teacher - t_top, (gap - offset) + (lost - more)


def _kl(student: jax.Array, teacher: jax.Array, gap: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(softmax(teacher) ‖ softmax(student)) and log Σ e^teacher − log Σ e^student, over the last axis.

    With p = softmax(teacher), gap = teacher − student and u = Σ p gap − gap, KL = log Σ p e^u, and as Σ p u = 0 it is
    log1p(Σ p (e^u − 1 − u)): where u is small no digits cancel, whereas differences of log-softmax lose all of them at
    high temperature. Classes at −∞ in both are left out.
    """
    p = jax.nn.softmax(teacher, axis=-1)
    out = jnp.isneginf(student) & jnp.isneginf(teacher)
    known = jnp.isfinite(gap) & ~out
    gap = jnp.where(known, gap, 0)
    mean = jnp.sum(p * gap, axis=-1, keepdims=True)
    u = jnp.where(known, mean - gap, 0)
    near = jnp.all((known | out) & (jnp.abs(u) < 8), axis=-1, keepdims=True)
    u, near = jnp.where(near, u, 0), near[..., 0]
    close = jnp.log1p(jnp.sum(p * _remainder(u), axis=-1))
    logs = jax.nn.log_softmax(teacher, axis=-1) - jax.nn.log_softmax(student, axis=-1)
    far = jnp.sum(p * jnp.where(p > 0, logs, 0), axis=-1)
    sums = jax.nn.logsumexp(teacher, axis=-1) - jax.nn.logsumexp(student, axis=-1)
    return jnp.where(near, close, far), jnp.where(near, mean[..., 0] - close, sums)


def standardize_logits(logits: jax.Array) -> jax.Array:
    """Computes (z − mean z) / (1e-7 + std z) per row, std with C − 1 (Sun et al. 2024, arXiv:2403.01427).

    Args:
      logits: float [..., C].

    Returns:
      The z-scores [..., C], in at least float32; 0, with gradient 0, for a row of equal logits.
    """
    (logits,) = wide(logits)
    rest = centre(logits)
    return rest / (1e-7 + norm(rest) / math.sqrt(max(logits.shape[-1] - 1, 1)))


def kd(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float, standardize: bool = False
) -> jax.Array:
    """Computes T² KL(softmax(t/T) ‖ softmax(s/T)) (Hinton, Vinyals & Dean 2015, arXiv:1503.02531).

    The value keeps its digits at any temperature; for T → ∞ it becomes ½ · mean_c ((s_c − s̄) − (t_c − t̄))².

    Args:
      student_logits: float [B, C], s.
      teacher_logits: float [B, C], t.
      temperature: T > 0. The factor T² is always there, so that gradients keep their size.
      standardize: whether to turn every row into z-scores first (`standardize_logits`).

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the shapes differ.
    """
    check_same(student_logits, teacher_logits, "logits [batch, classes]", 2)
    check_temperature(temperature)
    student, teacher = wide(student_logits, teacher_logits)
    if standardize:
        student, teacher = standardize_logits(student), standardize_logits(teacher)
    student, teacher, gap = _align(student, teacher)
    return temperature**2 * _kl(student / temperature, teacher / temperature, gap / temperature)[0]


def dkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> jax.Array:
    """Computes α T² KL(target against the rest) + β T² KL(among the others) (Zhao et al. 2022, arXiv:2203.08679).

    The first term compares the two probabilities (p_y, 1 − p_y), the second the distribution over the classes other
    than y. The released code rules y out by subtracting 1000 from its logit; here it is left out exactly.

    Args:
      student_logits: float [B, C].
      teacher_logits: float [B, C].
      labels: integers [B] in [0, C), y.
      alpha: α, the weight of the target class (the released default).
      beta: β, the weight of the other classes (the released default; the paper tunes it per teacher).
      temperature: T > 0.

    Returns:
      The loss [B], in at least float32; NaN for a label outside [0, C).

    Raises:
      InputError: where the shapes do not fit.
    """
    check_same(student_logits, teacher_logits, "logits [batch, classes]", 2)
    check_temperature(temperature)
    check_strength(alpha, "alpha")
    check_strength(beta, "beta")
    batch, classes = student_logits.shape
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels must be integers [batch], here ({batch},); got {labels.dtype} {labels.shape}: "
            f"take the most probable class of soft labels"
        )
    student, teacher = wide(student_logits, teacher_logits)
    target = labels[:, None] == jnp.arange(classes)[None]
    known = jnp.any(target, axis=-1)
    if classes == 1:
        return jnp.where(known, jnp.zeros(batch, student.dtype), jnp.nan)
    student, teacher, gap = (z / temperature for z in _align(student, teacher))
    others, drop = _kl(
        jnp.where(target, -jnp.inf, student), jnp.where(target, -jnp.inf, teacher), jnp.where(target, 0, gap)
    )

    def binary(logits):
        rest = jax.nn.logsumexp(logits, axis=-1, where=~target)
        return jnp.stack([jnp.sum(jnp.where(target, logits, 0), axis=-1), rest], axis=-1)

    gaps = jnp.stack([jnp.sum(jnp.where(target, gap, 0), axis=-1), drop], axis=-1)
    own, _ = _kl(binary(student), binary(teacher), gaps)
    return jnp.where(known, temperature**2 * (alpha * own + beta * others), jnp.nan)


def _pearson(x: jax.Array, y: jax.Array, axis: int, keep: jax.Array) -> jax.Array:
    x, y = centre(x, axis, keep), centre(y, axis, keep)
    lengths = (norm(x, axis) * norm(y, axis)).squeeze(axis)
    return jnp.sum(x * y, axis=axis) / (lengths + 1e-8)


def dist(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes β T² (1 − mean ρ of rows) + γ T² (1 − mean ρ of columns) (DIST, Huang et al. 2022, arXiv:2205.10536).

    ρ is Pearson's correlation of student and teacher probabilities, softmax(z/T): of the rows, the classes of one
    example, and of the columns, one class over the examples. As released, 1e-8 is added to the product of the norms;
    a row or column without spread correlates with nothing (ρ = 0, gradient 0).

    Args:
      student_logits: float [B, C].
      teacher_logits: float [B, C].
      beta: β, the weight of the relation between classes.
      gamma: γ, the weight of the relation within a class.
      temperature: T > 0 (released: 1 on ImageNet, 4 on CIFAR-100).
      mask: [B]; 0 leaves an example out.

    Returns:
      A scalar, in at least float32; 0 where every example is left out.

    Raises:
      InputError: where the shapes do not fit.
    """
    check_same(student_logits, teacher_logits, "logits [batch, classes]", 2)
    check_temperature(temperature)
    check_strength(beta, "beta")
    check_strength(gamma, "gamma")
    student, teacher = wide(student_logits, teacher_logits)
    keep = kept_rows(mask, len(student))
    p, q = (jax.nn.softmax(jnp.where(keep[:, None], z, 0) / temperature, axis=-1) for z in (student, teacher))
    count = jnp.sum(keep).astype(p.dtype)
    every = jnp.ones_like(keep[:, None])
    rows = jnp.sum(jnp.where(keep, 1 - _pearson(p, q, 1, every), 0)) / jnp.maximum(count, 1)
    columns = jnp.where(count > 0, 1 - jnp.mean(_pearson(p, q, 0, keep[:, None])), 0)
    return temperature**2 * (beta * rows + gamma * columns)
