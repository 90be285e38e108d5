"""Self-supervised losses in which one view predicts what another, or a teacher, makes of the example."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_share, check_temperature, kept_rows, normalize, wide


def negative_cosine(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Computes −cos(p, t) (SimSiam: Chen & He 2021, arXiv:2011.10566).

    BYOL's ‖p̂ − t̂‖² (Grill et al. 2020, arXiv:2006.07733) is 2 + 2 times this. Whether the target is learned is up to
    the caller: `jax.lax.stop_gradient(target)` where it must not be.

    Args:
      prediction: float [B, D].
      target: float [B, D].

    Returns:
      The loss [B], in at least float32; 0, with gradient 0, for a vector of length 0.

    Raises:
      InputError: where the shapes differ.
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise InputError(
            f"prediction and target must be [batch, dim] of one shape; got {prediction.shape} and {target.shape}"
        )
    p, t = wide(prediction, target)
    return -jnp.sum(normalize(p) * normalize(t), axis=1)


def sinkhorn(
    scores: jax.Array, *, epsilon: float = 0.05, iterations: int = 3, mask: jax.Array | None = None
) -> jax.Array:
    """Computes codes exp(scores/ε), scaled in turn to equal sums of the prototypes and to rows that sum to 1.

    The Sinkhorn–Knopp steps of SwAV (Caron et al. 2020, arXiv:2006.09882), on logarithms, so that nothing overflows.

    Args:
      scores: float [B, K], of each example for each prototype.
      epsilon: ε > 0, the smoothness of the codes.
      iterations: how often to scale.
      mask: [B]; 0 leaves an example out of the prototypes' sums.

    Returns:
      The codes [B, K], in at least float32; 0 where left out.

    Raises:
      InputError: where the shapes do not fit, or ε isn't positive.
    """
    if scores.ndim != 2:
        raise InputError(f"scores must be [batch, prototypes]; got {scores.shape}")
    check_temperature(epsilon, "epsilon")
    keep = kept_rows(mask, len(scores))[:, None]
    (scores,) = wide(scores)
    logs = jnp.where(keep, scores, 0) / epsilon
    for _ in range(iterations):
        logs = logs - jax.nn.logsumexp(logs, axis=0, keepdims=True, where=keep | ~jnp.any(keep))
        logs = jax.nn.log_softmax(logs, axis=1)
    return jnp.where(keep, jax.nn.softmax(logs, axis=1), 0)


def _same_rows(views: Sequence[jax.Array], what: str, least: int) -> tuple[jax.Array, ...]:
    if len(views) < least or any(view.ndim != 2 or view.shape != views[0].shape for view in views):
        raise InputError(
            f"{what} must be at least {least} views [batch, outputs] of one shape; got {[view.shape for view in views]}"
        )
    return wide(*views)


def _cross_entropies(targets: Sequence[jax.Array], logs: Sequence[jax.Array]) -> jax.Array:
    """The mean [B] of −Σ target · log over all targets i and logs v ≠ i."""
    pairs = [(q, p) for i, q in enumerate(targets) for v, p in enumerate(logs) if v != i]
    return -jnp.mean(jnp.stack([jnp.sum(q * p, axis=1) for q, p in pairs]), axis=0)


def swav(
    scores: Sequence[jax.Array],
    *,
    codes: int = 2,
    temperature: float | jax.Array = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queues: Sequence[jax.Array] | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes −Σ_k q_k log softmax(s/τ)_k, the mean over codes q of one view and scores s of another.

    SwAV (Caron et al. 2020, arXiv:2006.09882): each of the first views gives codes by `sinkhorn`, without a gradient,
    which every other view, small crops too, predicts.

    Args:
      scores: at least two views, float [B, K] each: embeddings of length 1 times prototypes of length 1.
      codes: how many of the views, the first, give codes.
      temperature: τ > 0.
      epsilon: ε of `sinkhorn`.
      iterations: those of `sinkhorn`.
      queues: scores of earlier examples, float [Q, K] for each view that gives codes; they join its `sinkhorn`.
      mask: [B]; 0 leaves an example out.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the shapes or numbers of views do not fit, or a temperature isn't positive.
    """
    check_temperature(temperature)
    check_temperature(epsilon, "epsilon")
    views = _same_rows(scores, "scores", 2)
    batch, prototypes = views[0].shape
    if not 1 <= codes <= len(views) or (queues is not None and len(queues) != codes):
        raise InputError(
            f"codes must be between 1 and the {len(views)} views, with a queue for each or none; got {codes}, "
            f"{None if queues is None else len(queues)} queues"
        )
    keep = kept_rows(mask, batch)
    views = [jnp.where(keep[:, None], view, 0) for view in views]
    targets = []
    for number, view in enumerate(views[:codes]):
        queue = jnp.zeros((0, prototypes), view.dtype) if queues is None else queues[number].astype(view.dtype)
        joined = jax.lax.stop_gradient(jnp.concatenate([queue, view]))
        counted = jnp.concatenate([jnp.ones(len(queue), bool), keep])
        targets.append(sinkhorn(joined, epsilon=epsilon, iterations=iterations, mask=counted)[len(queue) :])
    return _cross_entropies(targets, [jax.nn.log_softmax(view / temperature, axis=1) for view in views])


def dino(
    student: Sequence[jax.Array],
    teacher: Sequence[jax.Array],
    *,
    center: jax.Array,
    student_temperature: float | jax.Array = 0.1,
    teacher_temperature: float | jax.Array = 0.04,
) -> jax.Array:
    """Computes −Σ_k softmax((t − c)/τₜ)_k log softmax(s/τₛ)_k, the mean over pairs of a teacher's and another view.

    DINO (Caron et al. 2021, arXiv:2104.14294). No gradient flows into the teacher or the centre.

    Args:
      student: float [B, K] for each view, the teacher's views first, small crops after them.
      teacher: float [B, K] for each of the first views; at least two views in one of the lists.
      center: float [K], c, such as `dino_center` moves.
      student_temperature: τₛ > 0.
      teacher_temperature: τₜ > 0.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the shapes or numbers of views do not fit, or a temperature isn't positive.
    """
    check_temperature(student_temperature, "student_temperature")
    check_temperature(teacher_temperature, "teacher_temperature")
    s, t = _same_rows(student, "student", 2), _same_rows(teacher, "teacher", 1)
    if len(t) > len(s) or t[0].shape != s[0].shape or center.shape != s[0].shape[1:]:
        raise InputError(
            f"teacher must be the first views of the student's {len(s)} {s[0].shape} and center [outputs]; got "
            f"{len(t)} views {t[0].shape} and {center.shape}"
        )
    targets = [jax.lax.stop_gradient(jax.nn.softmax((view - center[None]) / teacher_temperature, axis=1)) for view in t]
    return _cross_entropies(targets, [jax.nn.log_softmax(view / student_temperature, axis=1) for view in s])


def dino_center(
    center: jax.Array, teacher: Sequence[jax.Array], *, momentum: float = 0.9, mask: jax.Array | None = None
) -> jax.Array:
    """Moves the centre of `dino`: m · c + (1 − m) · mean of the teacher's outputs over the batch and its views.

    Args:
      center: float [K], c, zeros to begin with.
      teacher: float [B, K] for each view.
      momentum: m.
      mask: [B]; 0 leaves an example out.

    Returns:
      The new centre [K], in the old one's dtype, without a gradient; the old one where every example is left out.

    Raises:
      InputError: where the shapes do not fit, or m is not in [0, 1].
    """
    check_share(momentum)
    views = _same_rows(teacher, "teacher", 1)
    keep = kept_rows(mask, len(views[0]))[:, None]
    total = sum(jnp.sum(jnp.where(keep, view, 0), axis=0) for view in views)
    count = len(views) * jnp.sum(keep)
    moved = momentum * center + (1 - momentum) * total / jnp.maximum(count, 1)
    return jax.lax.stop_gradient(jnp.where(count > 0, moved, center).astype(center.dtype))
