"""Batch norm whose statistics have the same bits however the batch is split over devices."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype


class BatchNorm(nn.Module):
    """Batch norm (Ioffe, Szegedy 2015, arXiv 1502.03167): y = (x − μ) / √(v + ε) · scale + bias, per channel.

    With `train`, μ and v = max(0, E[x²] − μ²) are the mean and variance over the global batch and all positions, in at
    least float32, and the running statistics move to m·old + (1 − m)·new; else they are the running statistics.
    Parameters (`scale`, `bias`), state (`mean`, `var` of `batch_stats`) and formulas are those of `nn.BatchNorm`; what
    differs is the order of the sums. They run over the positions of each example, then over the examples in an order
    that doesn't depend on where these live (`sum_rows`), so a forward pass gives the same bits on every number of
    devices where the other layers do. A plain sum differs in its last bits once it is split over devices; a ReLU whose
    input lies within rounding of zero then opens on one mesh and not on another, and gradients differ by 1e-3 and more.

    Attributes:
      train: whether the statistics are those of the batch.
      momentum: m, the share of the running statistics that an update keeps.
      epsilon: ε, added to the variance.
      dtype: type of the result; None infers it from inputs and parameters.
      param_dtype: type of the parameters.
      axis: name of the device axis over which rows are gathered under `pmap`, or None.
      plain: whether the sums are taken in one go: fewer operations, but bits that depend on the devices.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis: str | None = None
    plain: bool = False

    @nn.compact
    def __call__(self, x) -> Any:
        """Returns `x` [B, ..., C] normalised."""
        channels = (x.shape[-1],)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones_init(), channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), channels, self.param_dtype)
        dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if self.train:
            mean, var = statistics(x, None if self.is_initializing() else self.axis, plain=self.plain)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        else:
            mean, var = running_mean.value, running_var.value
        mean, factor, bias = (
            v.reshape((1,) * (x.ndim - 1) + channels) for v in (mean, jax.lax.rsqrt(var + self.epsilon) * scale, bias)
        )
        return ((x - mean) * factor + bias).astype(dtype)


def statistics(x: jax.Array, axis: str | None = None, *, plain: bool = False) -> tuple[jax.Array, jax.Array]:
    """Returns the mean [C] and the variance [C] of `x` [B, ..., C] over all but the last axis.

    Args:
      x: this device's rows.
      axis: name of the device axis that holds the other rows, or None.
      plain: whether to leave the order of the sums to XLA.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if plain:
        mean, square = (v.mean(tuple(range(x.ndim - 1))) for v in (x, jnp.square(x)))
        if axis is not None:
            mean, square = jax.lax.pmean((mean, square), axis)
        return mean, _not_below_zero(square - jnp.square(mean))
    inner = tuple(range(1, x.ndim - 1))
    count = (1 if axis is None else jax.lax.axis_size(axis)) * x.size // x.shape[-1]
    mean, square = (sum_rows(v.sum(inner), axis) / count for v in (x, jnp.square(x)))
    return mean, _not_below_zero(square - jnp.square(mean))


def _not_below_zero(x):
    """max(0, x); the derivative of `jnp.maximum` would compare x with the maximum, each rounded in its own way."""
    return jnp.where(x < 0, 0, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_rows(x: jax.Array, axis: str | None = None) -> jax.Array:
    """Returns the sum of `x` [B, ...] over the rows of all devices, with the same bits however they are split.

    Neighbours are added in pairs, then neighbours among these sums, and so on: additions of whole arrays, which no
    partitioner reorders, as it would split a reduction. The first pairs lie on one device each; once at most 16 rows
    are left they are copied to every device, which takes one message. Where halving doesn't come to 16 rows or fewer
    (B is 17, say, or 100) it is a plain sum, whose bits depend on the devices.

    Args:
      x: this device's rows; in a program over a mesh, all of them.
      axis: name of the device axis that holds the other rows, or None.
    """
    devices = 1 if axis is None else jax.lax.axis_size(axis)
    while x.shape[0] * devices > _COPIED and x.shape[0] % 2 == 0:
        x = _add_neighbours(x)
    x = _copy_to_all(x) if axis is None else jax.lax.all_gather(x, axis, tiled=True)
    while x.shape[0] > 2 and x.shape[0] % 2 == 0:
        x = _add_neighbours(x)
    if 2 < x.shape[0] <= _COPIED:
        return functools.reduce(jnp.add, x)
    return x.sum(0)  # two terms have one order; as a reduction, so that it isn't computed anew for every pixel


@sum_rows.defjvp
def _sum_rows_jvp(axis, primals, tangents):
    """The derivative is a plain sum, whose transpose is a broadcast."""
    total = tangents[0].sum(0)
    return sum_rows(primals[0], axis), total if axis is None else jax.lax.psum(total, axis)


_COPIED = 16  # rows


def _add_neighbours(x):
    pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
    return pairs[:, 0] + pairs[:, 1]


def _copy_to_all(x):
    """Returns few rows `x` as sums of one row and zeros: where rows are split, XLA then sums over the devices."""
    if x.shape[0] > _COPIED:
        return x
    own = jnp.eye(x.shape[0], dtype=bool).reshape(x.shape[0], *x.shape[:1], *(1,) * (x.ndim - 1))
    return jnp.where(own, x[None], 0).sum(1)
