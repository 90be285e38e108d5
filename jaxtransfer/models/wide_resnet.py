"""Wide residual nets for 32×32 images."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


class WideBlock(nn.Module):
    """Batch norm, ReLU, 3×3 convolution, twice, dropout before the second convolution.

    Where the shape changes, the shortcut is a 1×1 convolution of the activated input.
    """

    filters: int
    stride: int
    dropout: float
    layers: Layers

    @nn.compact
    def __call__(self, x):
        """Returns the block's maps [B, H / stride, W / stride, filters], not activated."""
        y = nn.relu(self.layers.norm("norm1")(x))
        if self.stride != 1 or x.shape[-1] != self.filters:
            x = self.layers.conv(self.filters, 1, stride=self.stride, name="shortcut_conv")(y)
        y = self.layers.conv(self.filters, stride=self.stride, name="conv1")(y)
        y = nn.relu(self.layers.norm("norm2")(y))
        y = self.layers.dropout(self.dropout)(y)
        return x + self.layers.conv(self.filters, name="conv2")(y)


class WideResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 times `width` filters."""

    blocks: int
    width: int
    classes: int
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: `stem`, `stage1` ... `stage3`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis, self.remat)
        outputs = {"stem": layers.conv(16, name="stem_conv")(x)}
        x = outputs["stem"]
        for stage in (1, 2, 3):
            for i in range(1, self.blocks + 1):
                stride = 2 if stage > 1 and i == 1 else 1
                filters = 8 * 2**stage * self.width
                kind = layers.block(WideBlock, self)
                x = kind(filters, stride, self.dropout, layers, name=f"stage{stage}_block{i}")(x)
            outputs[f"stage{stage}"] = x
        features = global_avg_pool(nn.relu(layers.norm("final_norm")(x)))
        return outputs | {"features": features, "logits": layers.logits(features, self.classes)}


@recorded
def wide_resnet(
    depth: int,
    width: int,
    classes: int,
    *,
    dropout: float = 0.0,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns WRN-depth-width (Zagoruyko, Komodakis 2016, arXiv 1605.07146); WRN-28-10 has 36.5 million.

    The stage maps are those before the next normalisation.

    Args:
      depth: number of layers, 6n + 4: 16, 22, 28, 40 in the paper.
      width: factor of the filters.
      classes: number of outputs.
      dropout: rate inside the blocks.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
      remat: compute each block anew in the backward pass: less memory, about a third more time.
    """
    if depth < 10 or depth % 6 != 4:
        raise InputError(f"expected a depth of 6n + 4 layers (10, 16, 22, 28, 40); got {depth}")
    types = {"dtype": dtype, "param_dtype": param_dtype}
    module = WideResNet((depth - 4) // 6, width, classes, dropout, remat=remat, **types)
    return linen(module, name=name, stages=("stem_.*", "stage1_.*", "stage2_.*", "stage3_.*|final_norm", "head"))
