"""A convolution that stays fast inside loops: the one place where its formulation is chosen by platform."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

from jaxtransfer.models.layers import max_pool


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


def convolve_and_halve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `x` [B, H, W, C] convolved with `kernel` [k, k, C, D] without padding, after 2 × 2 max pooling.

    The result is [B, ⌊(H - k + 1) / 2⌋, ⌊(W - k + 1) / 2⌋, D], for an odd k. On CPU both are one product, whose columns
    are the filters at the four places of a tile: a third to a half of the time of the two in turn, as there are a
    quarter of the patches, a little larger ones. Of pixels that tie, the first gets the gradient, as in `max_pool`.
    """
    return (_halved_by_patches if jax.default_backend() == "cpu" else _halved_by_convolution)(x, kernel)


def _halved_by_convolution(x, kernel):
    whole = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return max_pool(whole, 2)


def _halved_by_patches(x, kernel):
    height, width, channels, filters = kernel.shape
    rows, columns = (x.shape[1] - height + 1) // 2, (x.shape[2] - width + 1) // 2
    x = x[:, : 2 * rows + height - 1, : 2 * columns + width - 1]
    tiles = x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], x.shape[1] // 2, x.shape[2] // 2, 4 * channels)
    patches = jnp.concatenate(
        [tiles[:, i : i + rows, j : j + columns] for i in range((height + 1) // 2) for j in range((width + 1) // 2)],
        axis=-1,
    )
    moved = [jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)]
    moved = jnp.stack(moved, axis=3).reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels, 4 * filters)
    moved = moved.transpose(0, 2, 1, 3, 4, 5).reshape(-1, 4 * filters)
    product = _product(patches.reshape(-1, moved.shape[0]), moved)
    return max_pool(product.reshape(-1, 2, 2, filters), 2).reshape(x.shape[0], rows, columns, filters)


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


class ConvHalve(nn.Module):
    """A convolution without padding and 2 × 2 max pooling as one layer, with the parameters of `nn.Conv`."""

    filters: int
    size: int = 5
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x) -> Any:
        """Returns the output [B, H', W', D] for `x` [B, H, W, C]; see `convolve_and_halve`."""
        shape = (self.size, self.size, x.shape[-1], self.filters)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.filters,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return convolve_and_halve(x, kernel) + bias[None, None, None]
