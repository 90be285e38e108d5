"""What losses share: lengths and spreads whose gradients stay finite, pooling, checks of shapes.

NaN stays NaN: what has gone wrong must not come out as a finite loss.
"""

from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.parts.masking import check_weights

EXACT = jax.lax.Precision.HIGHEST  # full float32 products on hardware that would round them to 10 bits or fewer


def wide(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Casts arrays to the widest of their dtypes and float32."""
    dtype = jnp.result_type(jnp.float32, *(array.dtype for array in arrays))
    return tuple(array.astype(dtype) for array in arrays)


def norm(x: jax.Array, axis: int = -1) -> jax.Array:
    """Computes ‖x‖ along an axis, which stays as 1; the gradient of length 0 is 0."""
    return root(jnp.sum(jnp.square(x), axis=axis, keepdims=True))


@jax.custom_jvp
def root(squares: jax.Array) -> jax.Array:
    """Computes √s of s ≥ 0; the derivative at 0 is 0."""
    return jnp.sqrt(squares)


@root.defjvp
def _root_change(primals, tangents):
    """ds / 2√s by the root itself: it stays finite even where XLA computes s anew and rounds it to 0, or from 0."""
    length = root(*primals)
    some = length > 0
    return length, jnp.where(some, tangents[0] / jnp.where(some, 2 * length, 1), 0)


def pick(x: jax.Array, place: jax.Array) -> jax.Array:
    """Returns the entries [...] of `x` [..., N] at the integers `place` [...].

    For maxima and minima that are differentiated: pick(x, argmax(x)). The derivative of `jnp.max` compares x with the
    maximum, and in a compiled program each may be rounded in its own way; the gradient of an entry missed is lost.
    """
    own = jnp.arange(x.shape[-1]).reshape((1,) * place.ndim + (-1,)) == place[..., None]
    return jnp.sum(jnp.where(own, x, 0), axis=-1)


def normalize(x: jax.Array, axis: int = -1, eps: float = 1e-12) -> jax.Array:
    """Computes x / max(‖x‖, eps); a vector no longer than eps has no direction, its gradient is 0 instead of 1/eps."""
    length = norm(x, axis)
    short = length <= eps
    return jnp.where(short, jax.lax.stop_gradient(x / eps), x / jnp.where(short, 1, length))


def centre(x: jax.Array, axis: int = -1, keep: jax.Array | None = None) -> jax.Array:
    """Subtracts the mean along an axis; values equal to within rounding become 0, with gradient 0.

    Args:
      x: any shape.
      axis: where the mean is taken.
      keep: booleans that broadcast to x: what counts; the rest becomes 0.
    """
    kept = jnp.ones_like(x, bool) if keep is None else jnp.broadcast_to(keep, x.shape)
    x = jnp.where(kept, x, 0)
    count = jnp.maximum(jnp.sum(kept, axis=axis, keepdims=True), 1).astype(x.dtype)
    rest = jnp.where(kept, x - jnp.sum(x, axis=axis, keepdims=True) / count, 0)
    noise = jnp.square(4 * jnp.finfo(x.dtype).eps) * jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return jnp.where(jnp.sum(jnp.square(rest), axis=axis, keepdims=True) <= noise, 0, rest)


def _bins(size: int, out: int) -> np.ndarray:
    """The averaging matrix [out, size]: output i is the mean of inputs ⌊i·size/out⌋ up to ⌈(i+1)·size/out⌉."""
    weights = np.zeros((out, size))
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def pool(maps: jax.Array, height: int, width: int) -> jax.Array:
    """Averages maps [B, H, W, C] adaptively to [B, height, width, C], in the bins of `adaptive_avg_pool2d`."""
    if maps.shape[1] != height:
        rows = jnp.asarray(_bins(maps.shape[1], height), maps.dtype)
        maps = jnp.einsum("ph,bhwc->bpwc", rows, maps, precision=EXACT)
    if maps.shape[2] != width:
        columns = jnp.asarray(_bins(maps.shape[2], width), maps.dtype)
        maps = jnp.einsum("qw,bpwc->bpqc", columns, maps, precision=EXACT)
    return maps


def match(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pools two batches of maps to the smaller height and the smaller width of the two."""
    height, width = min(one.shape[1], other.shape[1]), min(one.shape[2], other.shape[2])
    return pool(one, height, width), pool(other, height, width)


def check_same(student: jax.Array, teacher: jax.Array, what: str, rank: int = 0) -> None:
    """Raises where two arrays differ in shape or have another rank (0: any of at least one axis)."""
    if student.shape != teacher.shape or not student.ndim or (rank and student.ndim != rank):
        raise InputError(
            f"student and teacher must be {what} of one shape; got student {student.shape}, teacher {teacher.shape}: "
            f"project the student to the teacher's shape, or take outputs that fit"
        )


def check_maps(student: jax.Array, teacher: jax.Array, *, channels: bool = False) -> None:
    """Raises where two arrays are not maps [B, H, W, C] of one batch (and, if asked, of one number of channels)."""
    fit = student.ndim == teacher.ndim == 4 and student.shape[0] == teacher.shape[0]
    if not fit or (channels and student.shape[3] != teacher.shape[3]):
        equal = "batch and of equal channels" if channels else "batch"
        raise InputError(
            f"student and teacher must be maps [batch, height, width, channels] of one {equal}; got student "
            f"{student.shape}, teacher {teacher.shape}: "
            + ("project the student by a 1x1 convolution" if fit else "take maps of the same examples, channels last")
        )


def check_domains(source: jax.Array, target: jax.Array) -> None:
    """Raises where two arrays are not features [examples, dim] of one dim, of any two numbers of examples."""
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise InputError(
            f"source and target must be features [examples, dim] of one dim; got {source.shape} and {target.shape}"
        )


def kept_rows(mask: jax.Array | None, batch: int) -> jax.Array:
    """Returns booleans [B]: true where the mask is above 0; without a mask everywhere."""
    if mask is None:
        return jnp.ones(batch, bool)
    if mask.shape != (batch,):
        raise InputError(f"mask must have one entry per example, ({batch},); got {mask.shape}")
    check_weights(mask)
    return mask > 0


def check_temperature(temperature, what: str = "temperature") -> None:
    """Raises for a temperature, or another scale, that is known and not positive and finite; a traced one passes."""
    _check_number(temperature, what, "positive and finite", lambda value: 0 < value < float("inf"))


def check_strength(strength, what: str = "strength") -> None:
    """Raises for a strength that is known and negative or not finite; a traced one passes."""
    _check_number(strength, what, "finite and not negative", lambda value: 0 <= value < float("inf"))


def check_share(share, what: str = "momentum") -> None:
    """Raises for a share that is known and not in [0, 1]; a traced one passes."""
    _check_number(share, what, "in [0, 1]", lambda value: 0 <= value <= 1)


def _check_number(number, what: str, expected: str, good: Callable[[float], bool]) -> None:
    if isinstance(number, jax.core.Tracer):
        return
    try:
        value = float(number)
    except (TypeError, ValueError):
        raise InputError(f"{what} must be a number, {expected}; got {number!r}") from None
    if not good(value):
        raise InputError(f"{what} must be {expected}; got {number}")
