"""VGG-11, 13, 16 and 19, for 224×224 and for 32×32 images."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool, halve
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, each ended by 2×2 max pooling."""

    depth: int
    classes: int
    batch_norm: bool = True
    small_images: bool = False
    dropout: float = 0.5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: `stage1` ... `stage5`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)
        outputs = {}
        for stage, convolutions in enumerate(CONVOLUTIONS[self.depth], 1):
            for i in range(1, convolutions + 1):
                x = layers.conv(min(32 * 2**stage, 512), bias=True, name=f"stage{stage}_conv{i}")(x)
                x = nn.relu(layers.norm(f"stage{stage}_norm{i}")(x) if self.batch_norm else x)
            outputs[f"stage{stage}"] = x = halve(x)
        if self.small_images:
            x = global_avg_pool(x)
        else:
            x = x.reshape(x.shape[0], -1)
            for name in ("fc1", "fc2"):
                x = layers.dropout(self.dropout)(nn.relu(layers.dense(4096, name)(x)))
        return outputs | {"features": x, "logits": layers.logits(x, self.classes)}


@recorded
def vgg(
    depth: int,
    classes: int,
    *,
    batch_norm: bool = True,
    small_images: bool = False,
    dropout: float = 0.5,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns a VGG net (Simonyan, Zisserman 2015, arXiv 1409.1556).

    Pooling stops once a side of the map is 1, so that images smaller than 32×32 fit too.

    Args:
      depth: number of layers with weights in the 224×224 form, 11, 13, 16 or 19.
      classes: number of outputs.
      batch_norm: whether batch norm follows each convolution (which keeps its bias, as in torchvision).
      small_images: for images of about 32×32 the head is one linear layer on the mean of the last map (512
        features). Otherwise two hidden layers of 4096 units with dropout come first, on the flat map: 7×7
        for 224×224 images, and the weights fit images of that size only.
      dropout: rate of the hidden layers; unused where `small_images`.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    if depth not in CONVOLUTIONS:
        raise InputError(f"expected a depth of {', '.join(map(str, CONVOLUTIONS))} layers; got {depth}")
    module = VGG(depth, classes, batch_norm, small_images, dropout, dtype=dtype, param_dtype=param_dtype)
    hidden = () if small_images else ("fc1|fc2",)
    return linen(module, name=name, stages=(*(f"stage{i}_.*" for i in range(1, 6)), *hidden, "head"))


def vgg11(
    classes: int,
    *,
    batch_norm: bool = True,
    small_images: bool = False,
    dropout: float = 0.5,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns VGG-11, 132.9 million parameters for 224×224 images and 1000 classes; see `vgg`."""
    return vgg(
        11,
        classes,
        batch_norm=batch_norm,
        small_images=small_images,
        dropout=dropout,
        name=name,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def vgg13(
    classes: int,
    *,
    batch_norm: bool = True,
    small_images: bool = False,
    dropout: float = 0.5,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns VGG-13, 133.1 million parameters for 224×224 images and 1000 classes; see `vgg`."""
    return vgg(
        13,
        classes,
        batch_norm=batch_norm,
        small_images=small_images,
        dropout=dropout,
        name=name,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def vgg16(
    classes: int,
    *,
    batch_norm: bool = True,
    small_images: bool = False,
    dropout: float = 0.5,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns VGG-16, 138.4 million parameters for 224×224 images and 1000 classes; see `vgg`."""
    return vgg(
        16,
        classes,
        batch_norm=batch_norm,
        small_images=small_images,
        dropout=dropout,
        name=name,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def vgg19(
    classes: int,
    *,
    batch_norm: bool = True,
    small_images: bool = False,
    dropout: float = 0.5,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns VGG-19, 143.7 million parameters for 224×224 images and 1000 classes; see `vgg`."""
    return vgg(
        19,
        classes,
        batch_norm=batch_norm,
        small_images=small_images,
        dropout=dropout,
        name=name,
        dtype=dtype,
        param_dtype=param_dtype,
    )
