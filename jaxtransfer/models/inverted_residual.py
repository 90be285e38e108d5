"""Inverted residuals, the blocks of MobileNet-v2 and EfficientNet-Lite."""

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.models.depthwise import DepthwiseConv
from jaxtransfer.models.layers import Layers


def relu6(x):
    """Returns min(max(x, 0), 6); where x is 0 or 6 the derivative is 0."""
    return jnp.where(x >= 6, jnp.asarray(6, x.dtype), nn.relu(x))  # NaN stays NaN


class InvertedResidual(nn.Module):
    """A 1×1 convolution that widens, a depthwise one, a 1×1 one that narrows; added to its input where that has
    as many maps and no stride lies between.

    Sandler et al. 2018, arXiv 1801.04381.
    """

    filters: int
    size: int
    stride: int
    wider: int
    layers: Layers
    same: bool
    epsilon: float

    @nn.compact
    def __call__(self, x):
        """Returns the block's maps [B, H / stride, W / stride, filters], not activated."""
        types = {"dtype": self.layers.dtype, "param_dtype": self.layers.param_dtype}
        y = x
        if self.wider > 1:
            y = self.layers.conv(self.wider * x.shape[-1], 1, name="expand_conv")(y)
            y = relu6(self.layers.norm("expand_norm", epsilon=self.epsilon)(y))
        y = DepthwiseConv(self.size, self.stride, self.same, name="depthwise_conv", **types)(y)
        y = relu6(self.layers.norm("depthwise_norm", epsilon=self.epsilon)(y))
        y = self.layers.conv(self.filters, 1, name="project_conv")(y)
        y = self.layers.norm("project_norm", epsilon=self.epsilon)(y)
        return x + y if self.stride == 1 and x.shape == y.shape else y


def by_eight(filters: float) -> int:
    """Returns the closest multiple of eight that is no less than nine tenths.

    Args:
      filters: a number of filters, scaled.
    """
    rounded = max(8, int(filters + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * filters else rounded
