"""Distillation from intermediate features: maps [B, H, W, C], example by example."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_maps, check_same, check_temperature, match, normalize, pool, wide


def _mean(values: jax.Array) -> jax.Array:
    """Averages over everything but the batch."""
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _flat(maps: jax.Array) -> jax.Array:
    """Joins the positions: [B, H, W, C] to [B, H·W, C]."""
    return maps.reshape(maps.shape[0], -1, maps.shape[-1])


def hint(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Computes mean (s − t)² per example, the regression of FitNets (Romero et al. 2015, arXiv:1412.6550).

    The paper writes ½‖s − t‖² and the authors' code half the sum over one axis and the mean over the others; the mean
    here, as in the re-implementations that are compared in the literature, is n/2 times smaller for n features.

    Args:
      student: float [B, ...], already brought to the teacher's shape by a regressor.
      teacher: float of the same shape.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the shapes differ.
    """
    check_same(student, teacher, "features [batch, ...]")
    student, teacher = wide(student, teacher)
    return _mean(jnp.square(student - teacher))


def _power(x: jax.Array, p: float) -> jax.Array:
    """|x|^p, with the derivatives of x^p for even p and those of 0 at 0 otherwise."""
    if p % 2 == 0:
        return x ** int(p)
    positive = jnp.abs(x) > 0
    return jnp.where(positive, jnp.where(positive, jnp.abs(x), 1) ** p, 0)


def attention_transfer(student: jax.Array, teacher: jax.Array, *, p: float = 2) -> jax.Array:
    """Computes mean (Q(s) − Q(t))² over positions, Q = F/‖F‖ with F = mean_c |A_c|^p (arXiv:1612.03928).

    Zagoruyko & Komodakis 2017. The paper writes ‖Q(s) − Q(t)‖₂; the authors' code takes the mean of squares, as here.
    Of maps of two sizes the larger is averaged to the smaller before the power, as in RepDistiller, which leaves out
    the absolute value: for odd p that differs where activations are negative.

    Args:
      student: float [B, H, W, C].
      teacher: float [B, H', W', C'].
      p: at least 1; a larger power weighs the strongest activations more.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the arrays are not maps of one batch.
    """
    check_maps(student, teacher)
    if not 1 <= p < float("inf"):
        raise InputError(f"p must be at least 1 and finite; got {p}")
    pair = match(*wide(student, teacher))
    s, t = (normalize(jnp.mean(_power(_flat(maps), p), axis=-1)) for maps in pair)
    return _mean(jnp.square(s - t))


def nst(student: jax.Array, teacher: jax.Array, *, kernel: Callable[[jax.Array], jax.Array] = jnp.square) -> jax.Array:
    """Computes MMD² = mean k(tᵢ·tⱼ) + mean k(sᵢ·sⱼ) − 2 mean k(sᵢ·tⱼ) over pairs of channels (arXiv:1707.01219).

    Huang & Wang 2017, neuron selectivity transfer: sᵢ and tⱼ are the maps of single channels, flattened, of length 1.
    Of maps of two sizes the larger is averaged to the smaller first.

    Args:
      student: float [B, H, W, C].
      teacher: float [B, H', W', C'].
      kernel: k, an elementwise function of the inner products; by default the polynomial (x·y)² of the paper's best
        results, which is the released form.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the arrays are not maps of one batch.
    """
    check_maps(student, teacher)
    s, t = (normalize(_flat(maps), axis=1) for maps in match(*wide(student, teacher)))

    def similarity(x, y):
        return _mean(kernel(jnp.einsum("bpi,bpj->bij", x, y, precision=EXACT)))

    return similarity(t, t) + similarity(s, s) - 2 * similarity(s, t)


def fsp(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:
    """Computes Σ_l mean (G(s_l, s_{l+1}) − G(t_l, t_{l+1}))² of the flow of solution procedure (Yim et al., CVPR 2017).

    G_ij = mean over positions of xᵢ yⱼ, the channels i of one map and j of the next; of two sizes the larger is
    averaged to the smaller (the paper pools by the maximum, RepDistiller by the mean). The paper sums squares over
    the matrix; the mean here is RepDistiller's.

    Args:
      student: two or more maps [B, H_l, W_l, C_l], from the input to the output.
      teacher: as many maps, with the same C_l.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the sequences differ in length or channels, or have fewer than two maps.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise InputError(
            f"student and teacher must each give the same number of maps, at least 2; got {len(student)} and "
            f"{len(teacher)}: name the layers at which the resolution changes"
        )
    for s, t in zip(student, teacher, strict=True):
        check_maps(s, t, channels=True)
    student, teacher = (wide(*maps) for maps in (student, teacher))

    def flows(maps):
        for below, above in pairwise(maps):
            x, y = (_flat(m) for m in match(below, above))
            yield jnp.einsum("bpi,bpj->bij", x, y, precision=EXACT) / x.shape[1]

    return sum(
        (_mean(jnp.square(s - t)) for s, t in zip(flows(student), flows(teacher), strict=True)),
        start=jnp.zeros((), jnp.float32),
    )


def vid(student: jax.Array, teacher: jax.Array, *, scale: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Computes mean ½ ((t − s)²/σ² + log σ²), σ² = softplus(scale) + ε per channel (Ahn et al. 2019, arXiv:1904.05835).

    Variational information distillation: the negative log-likelihood of the teacher's features under a Gaussian whose
    mean the student predicts, without its constant ½ log 2π. The paper sums over entries, the released code averages.

    Args:
      student: float [B, H, W, C] or [B, C], the predicted mean.
      teacher: float [B, H', W', C] or [B, C]; of maps of two sizes the larger is averaged to the smaller.
      scale: float [C], learned; the released code starts at log(exp(5 − eps) − 1), a variance of 5.
      eps: ε, the least variance.

    Returns:
      The loss [B], in at least float32; it may be negative.

    Raises:
      InputError: where the shapes do not fit.
    """
    if student.ndim == 2:
        check_same(student, teacher, "features [batch, channels]", 2)
    else:
        check_maps(student, teacher, channels=True)
    if scale.shape != student.shape[-1:]:
        raise InputError(f"scale must have one entry per channel, {student.shape[-1:]}; got {scale.shape}")
    check_temperature(eps, "eps")
    student, teacher, scale = wide(student, teacher, scale)
    if student.ndim == 4:
        student, teacher = match(student, teacher)
    variance = jnp.expand_dims(jax.nn.softplus(scale) + eps, range(student.ndim - 1))
    return _mean(0.5 * (jnp.square(teacher - student) / variance + jnp.log(variance)))


def review_kd(student: Sequence[jax.Array], teacher: Sequence[jax.Array]) -> jax.Array:
    """Computes the hierarchical context loss of knowledge review, summed over maps (arXiv:2104.09044).

    Chen et al. 2021: per map the mean squared difference, plus ½, ¼, ⅛ of that of both maps averaged to 4×4, 2×2, 1×1,
    over the sum of the weights. As released, a size that is not below the map's height is skipped, and the next takes
    its weight.

    Args:
      student: one or more maps [B, H_l, W_l, C_l] or features [B, C_l], already fused and projected.
      teacher: as many, of the same shapes.

    Returns:
      The loss [B], in at least float32.

    Raises:
      InputError: where the sequences differ in length or shapes.
    """
    if len(student) != len(teacher) or not len(student):
        raise InputError(
            f"student and teacher must each give the same number of maps, at least 1; got {len(student)} and "
            f"{len(teacher)}"
        )
    total = jnp.zeros((), jnp.float32)
    for s, t in zip(student, teacher, strict=True):
        check_same(s, t, "maps [batch, height, width, channels]", 2 if s.ndim == 2 else 4)
        s, t = wide(s, t)
        difference = s - t  # averaging is linear: the difference of averages is the average of differences
        loss, weight, weights = _mean(jnp.square(difference)), 1.0, 1.0
        for size in (4, 2, 1):
            if s.ndim == 4 and size < s.shape[1]:
                weight /= 2
                loss += weight * _mean(jnp.square(pool(difference, size, size)))
                weights += weight
        total = total + loss / weights
    return total
