"""What the networks share: layers of one precision, pooling, and the checks of an image batch."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.models.batch_norm import BatchNorm

_KEPT: contextvars.ContextVar[bool] = contextvars.ContextVar("kept whole", default=False)
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes the layers of one forward pass, so that precision and mode are said once.

    Convolutions pad by half their size on each side, as PyTorch does, so that its weights give its outputs.

    Attributes:
      train: whether batch norm uses (and updates) the statistics of the batch, and dropout drops.
      dtype: type of the computation; None infers it from inputs and parameters.
      param_dtype: type of the parameters.
      axis: name of the device axis over which batch norm averages, or None.
      remat: whether blocks are computed anew in the backward pass.
    """

    train: bool
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None
    remat: bool = False

    def block(self, kind: type[nn.Module], inside: nn.Module) -> Any:
        """Returns the class of a block `inside` a network: `kind`, which with `remat` keeps its inputs alone.

        What lies in a block is then computed again when its gradient is (Chen et al. 2016, arXiv 1604.06174): the same
        parameters under the same names, the same draws of dropout. Not while weights are drawn, which needs no
        gradient: the program that draws them is to tell that they don't depend on the inputs. XLA's CPU compiler undoes
        it: memory is saved on accelerators.
        """
        return _again(kind) if self.remat and not inside.is_initializing() and not _KEPT.get() else kind

    def conv(self, filters: int, size: int = 3, *, stride: int = 1, bias: bool = False, name: str) -> nn.Conv:
        """Returns a convolution with He-normal (fan out) weights (He et al. 2015, arXiv 1502.01852)."""
        pad = (size // 2, size // 2)
        return nn.Conv(
            filters,
            (size, size),
            strides=(stride, stride),
            padding=(pad, pad),
            use_bias=bias,
            kernel_init=he_normal,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def norm(self, name: str, *, epsilon: float = 1e-5) -> BatchNorm:
        """Returns batch norm with momentum 0.9 (Ioffe, Szegedy 2015, arXiv 1502.03167)."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return BatchNorm(self.train, epsilon=epsilon, axis=self.axis, name=name, **types)

    def local_norm(self, name: str) -> BatchNorm:
        """Returns batch norm by plain sums: fewer operations, for few-shot networks, whose batches are small."""
        return BatchNorm(
            self.train, dtype=self.dtype, param_dtype=self.param_dtype, axis=self.axis, plain=True, name=name
        )

    def dense(self, features: int, name: str) -> nn.Dense:
        """Returns a linear layer."""
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def dropout(self, rate: float) -> nn.Dropout:
        """Returns dropout, which drops only when training."""
        return nn.Dropout(rate, deterministic=not self.train)

    def logits(self, features, classes: int):
        """Returns the output [B, C] of the linear layer `head` on `features` [B, D], in at least float32."""
        dtype = None if self.dtype is None else jnp.promote_types(self.dtype, jnp.float32)
        logits = nn.Dense(classes, dtype=dtype, param_dtype=self.param_dtype, name="head")(features)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """Runs what is applied inside without rematerialisation: for what takes values out of the middle of blocks."""
    token = _KEPT.set(True)
    try:
        yield
    finally:
        _KEPT.reset(token)


@functools.cache
def _again(kind: type[nn.Module]) -> Any:
    """Returns the block's class with rematerialisation, one for each."""
    return nn.remat(kind)


def check_images(x) -> None:
    """Raises InputError unless `x` is a batch of images [B, H, W, C] with at least one pixel."""
    if jnp.ndim(x) != 4 or min(jnp.shape(x)[1:]) < 1:
        raise InputError(f"expected a batch of images of shape [B, H, W, C]; got shape {jnp.shape(x)}")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def max_pool(x, window: int):
    """Returns the maximum of each `window` × `window` tile of `x` [B, H, W, C]; remainders are dropped.

    Equals max pooling with stride = window and padding "VALID"; of pixels that tie, the first gets the gradient, row
    by row. Derivatives of any order are fast, and what is not differentiated pays nothing for them.

    The derivative takes what is at the place of the maximum, an integer. JAX's derivative of a maximum (`jnp.max` as
    well as `jnp.maximum`) marks the place by `x == maximum` instead. In a compiled program each side may be computed
    anew, in fusions that round differently, with fused multiply-add or without: the mark then misses and the gradient
    is lost in silence (`experiments/max_gradient.py`). A place computed twice can name two pixels only where they are
    equal to within rounding, and each of them is a right answer.
    """
    return _largest(_tiles(x, window))[0]


@max_pool.defjvp
def _max_pool_change(window: int, primals, tangents):
    """The change of each maximum is that at its place; the value is `max_pool` again, for derivatives of it."""
    (x,), (change,) = primals, tangents
    _, place = _largest(_tiles(jax.lax.stop_gradient(x), window))
    rows, columns = (jnp.arange(window).reshape(shape) for shape in ((window, 1, 1, 1), (1, 1, window, 1)))
    chosen = (rows * window + columns)[None, None] == place[:, :, None, :, None]
    return max_pool(x, window), jnp.sum(jnp.where(chosen, _tiles(change, window), 0), (2, 4))


def avg_pool(x, window: int):
    """Returns the mean of each `window` × `window` tile of `x` [B, H, W, C]; remainders are dropped."""
    return _tiles(x, window).mean((2, 4))


def halve(x):
    """Returns `x` [B, H, W, C] after 2 × 2 max pooling, or `x` itself where a side of the map is 1."""
    return max_pool(x, 2) if min(x.shape[1:3]) >= 2 else x


def global_avg_pool(x):
    """Returns the mean [B, C] over the positions of `x` [B, H, W, C]."""
    return x.mean((1, 2))


def _largest(tiles):
    """Returns the largest entry of each tile [B, rows, columns, C], and its place, row · window + column."""
    window = tiles.shape[2]
    best = tiles[:, :, 0, :, 0]
    place = jnp.zeros(best.shape, jnp.int32)
    for number in range(1, window * window):  # by pairs: a third of the time of a reduction over two short axes
        other = tiles[:, :, number // window, :, number % window]
        larger = (other > best) | jnp.isnan(other)  # NaN stays NaN
        best, place = jnp.where(larger, other, best), jnp.where(larger, number, place)
    return best, place


def _tiles(x, window: int):
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(batch, rows, window, columns, window, channels)
