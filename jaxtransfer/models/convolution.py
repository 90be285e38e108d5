"""A convolution that stays fast inside loops: the one place where its formulation is chosen by platform."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Returns the convolution of `x` [B, H, W, C] with `kernel` [k, k, C, D], padded by ⌊k/2⌋ on each side.

    On CPU it is a product with the patches: XLA's convolution is slow there inside `scan` (its weight gradient 30
    times and more), in which tasks and steps run, and no faster outside of it for the few-shot networks. Elsewhere it
    is the platform's own convolution.
    """
    return (_by_patches if jax.default_backend() == "cpu" else _by_convolution)(x, kernel, stride)


def _by_convolution(x, kernel, stride):
    padding = [(kernel.shape[0] // 2, kernel.shape[0] // 2), (kernel.shape[1] // 2, kernel.shape[1] // 2)]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_patches(x, kernel, stride):
    height, width, channels, filters = kernel.shape
    x = jnp.pad(x, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
    rows, columns = ((x.shape[i + 1] - kernel.shape[i]) // stride + 1 for i in (0, 1))

    def shifted(i, j):
        return x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride]

    patches = jnp.concatenate([shifted(i, j) for i in range(height) for j in range(width)], axis=-1)
    product = _product(patches.reshape(-1, height * width * channels), kernel.reshape(-1, filters))
    return product.reshape(x.shape[0], rows, columns, filters)


_MANY = 200  # rows, from where on the form of the weight gradient matters more than that of the product


def _product(patches, kernel):
    """Returns patches @ kernel, for many patches in the form whose weight gradient is fast.

    XLA's CPU takes patchesᵀ @ gradient [K, D] at half of the peak and gradientᵀ @ patches [D, K] at 70 to 80 %. The
    latter is the derivative in the transposed kernel; behind the barrier XLA doesn't turn it back into the former.
    """
    rows = patches.shape[0]
    few = rows < _MANY if isinstance(rows, int) else True  # of an exported program it is a symbol, and nothing trains
    if few or kernel.shape[0] <= kernel.shape[1]:
        return patches @ kernel
    transposed = jax.lax.optimization_barrier(kernel.T)
    return jax.lax.dot_general(patches, transposed, (((1,), (1,)), ((), ())))


class Conv(nn.Module):
    """A convolutional layer by `convolve`, with the parameters of `nn.Conv`: `kernel` [k, k, C, D] and `bias` [D]."""

    filters: int
    size: int = 3
    stride: int = 1
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x) -> Any:
        """Returns the output [B, H', W', D] for `x` [B, H, W, C]."""
        shape = (self.size, self.size, x.shape[-1], self.filters)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.filters,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return convolve(x, kernel, self.stride) + bias[None, None, None]
