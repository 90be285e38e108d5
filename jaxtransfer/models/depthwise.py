"""Depthwise convolution: a kernel for each channel; the one place where its formulation is chosen by platform."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import export

from jaxtransfer.models.layers import he_normal


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1, *, same: bool = False) -> jax.Array:
    """Returns the convolution of each channel of `x` [B, H, W, C] with its own `kernel` [k, k, 1, C].

    On CPU it is the sum of the k² shifted images times their weights: XLA's grouped convolution goes channel by channel
    there, and its derivatives all the more. Elsewhere it is the platform's own.

    Args:
      x: maps.
      kernel: kernels.
      stride: along both sides.
      same: whether to pad as TensorFlow does, to ⌈H / stride⌉ rows, more behind than before where the two differ;
        otherwise by ⌊k / 2⌋ on each side.
    """
    sides = range(2)
    padding = [_padding(x.shape[1 + i], kernel.shape[i], stride, same) for i in sides]
    shifts, convolution = (
        functools.partial(form, stride=stride, padding=padding) for form in (by_shifts, by_convolution)
    )
    if export.is_symbolic_dim(x.shape[0]):  # exported, for other platforms than this one too
        return jax.lax.platform_dependent(x, kernel, cpu=shifts, default=convolution)
    return (shifts if jax.default_backend() == "cpu" else convolution)(x, kernel)


def by_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: Any) -> jax.Array:
    """Returns it as XLA's grouped convolution.

    Args:
      x: maps [B, H, W, C].
      kernel: kernels [k, k, 1, C].
      stride: along both sides.
      padding: (before, after) for each side.
    """
    return jax.lax.conv_general_dilated(
        *(x, kernel, (stride, stride), padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def by_shifts(x: jax.Array, kernel: jax.Array, stride: int, padding: Any) -> jax.Array:
    """Returns it as a sum over the places of the kernel.

    Args:
      x: maps [B, H, W, C].
      kernel: kernels [k, k, 1, C].
      stride: along both sides.
      padding: (before, after) for each side.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((x.shape[1 + i] - kernel.shape[i]) // stride + 1 for i in range(2))
    total = None
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            ends = (i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1)
            part = x[:, i : ends[0] : stride, j : ends[1] : stride] * kernel[i, j][None, None]
            total = part if total is None else total + part
    assert total is not None
    return total


class DepthwiseConv(nn.Module):
    """A depthwise convolution without a bias, with the parameter of `nn.Conv`: `kernel` [k, k, 1, C]."""

    size: int = 3
    stride: int = 1
    same: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x) -> Any:
        """Returns the maps [B, H', W', C] for `x` [B, H, W, C]."""
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", he_normal, shape, self.param_dtype)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        return depthwise(x, kernel, self.stride, same=self.same)


def _padding(size: int, kernel: int, stride: int, same: bool) -> tuple[int, int]:
    if not same:
        return kernel // 2, kernel // 2
    missing = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return missing // 2, missing - missing // 2
