"""Residual nets for 32×32 images: ResNet-20 to ResNet-110, and their pre-activation form."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


def shortcut_a(x, filters: int, stride: int):
    """Returns the parameter-free shortcut "option A": every `stride`-th pixel, new channels of zeros.

    Half of the new channels stand before the old ones and half after (He et al. 2016, §3.3).

    Args:
      x: maps [B, H, W, C].
      filters: channels of the result, at least C.
      stride: step along both sides of the map.
    """
    x = x[:, ::stride, ::stride]
    new = filters - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class Block(nn.Module):
    """Two 3×3 convolutions, the activation after them (He et al. 2016, arXiv 1512.03385)."""

    filters: int
    stride: int
    layers: Layers

    @nn.compact
    def __call__(self, x):
        """Returns the block's maps [B, H / stride, W / stride, filters]."""
        y = self.layers.conv(self.filters, stride=self.stride, name="conv1")(x)
        y = nn.relu(self.layers.norm("norm1")(y))
        y = self.layers.conv(self.filters, name="conv2")(y)
        y = self.layers.norm("norm2")(y)
        return nn.relu(y + shortcut_a(x, self.filters, self.stride))


class PreactivationBlock(nn.Module):
    """Two 3×3 convolutions, the activation before each (He et al. 2016b, arXiv 1603.05027).

    In the net's first block the first activation comes before the split into two paths (their appendix).
    """

    filters: int
    stride: int
    layers: Layers
    first: bool = False

    @nn.compact
    def __call__(self, x):
        """Returns the block's maps [B, H / stride, W / stride, filters], not activated."""
        y = nn.relu(self.layers.norm("norm1")(x))
        x = y if self.first else x
        y = self.layers.conv(self.filters, stride=self.stride, name="conv1")(y)
        y = nn.relu(self.layers.norm("norm2")(y))
        y = self.layers.conv(self.filters, name="conv2")(y)
        return y + shortcut_a(x, self.filters, self.stride)


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks with 16, 32 and 64 filters."""

    blocks: int
    classes: int
    preactivation: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: `stem`, `stage1` ... `stage3`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis, self.remat)
        x = layers.conv(16, name="stem_conv")(x)
        outputs = {"stem": x if self.preactivation else nn.relu(layers.norm("stem_norm")(x))}
        x = outputs["stem"]
        for stage, filters in enumerate((16, 32, 64), 1):
            for i in range(1, self.blocks + 1):
                stride = 2 if stage > 1 and i == 1 else 1
                name = f"stage{stage}_block{i}"
                if self.preactivation:
                    kind = layers.block(PreactivationBlock, self)
                    x = kind(filters, stride, layers, stage == i == 1, name=name)(x)
                else:
                    x = layers.block(Block, self)(filters, stride, layers, name=name)(x)
            outputs[f"stage{stage}"] = x
        if self.preactivation:
            x = nn.relu(layers.norm("final_norm")(x))
        features = global_avg_pool(x)
        return outputs | {"features": features, "logits": layers.logits(features, self.classes)}


@recorded
def cifar_resnet(
    depth: int,
    classes: int,
    *,
    preactivation: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns the residual net of 6n + 2 layers for small images, with shortcuts without parameters.

    The stage maps of the pre-activation form are those before the next normalisation.

    Args:
      depth: number of layers: 20, 32, 44, 56, 110 in the paper.
      classes: number of outputs.
      preactivation: activate before the convolutions (He et al. 2016b, arXiv 1603.05027), not after them
        (He et al. 2016, arXiv 1512.03385, §4.2).
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
      remat: compute each block anew in the backward pass: less memory, about a third more time.
    """
    if depth < 8 or depth % 6 != 2:
        raise InputError(f"expected a depth of 6n + 2 layers (20, 32, 44, 56, 110); got {depth}")
    module = CifarResNet((depth - 2) // 6, classes, preactivation, dtype=dtype, param_dtype=param_dtype, remat=remat)
    return linen(module, name=name, stages=("stem_.*", "stage1_.*", "stage2_.*", "stage3_.*|final_norm", "head"))


def resnet20(
    classes: int,
    *,
    preactivation: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-20 for small images, 0.27 million parameters at 10 classes; see `cifar_resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return cifar_resnet(20, classes, preactivation=preactivation, **options)


def resnet32(
    classes: int,
    *,
    preactivation: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-32 for small images, 0.46 million parameters at 10 classes; see `cifar_resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return cifar_resnet(32, classes, preactivation=preactivation, **options)


def resnet44(
    classes: int,
    *,
    preactivation: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-44 for small images, 0.66 million parameters at 10 classes; see `cifar_resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return cifar_resnet(44, classes, preactivation=preactivation, **options)


def resnet56(
    classes: int,
    *,
    preactivation: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-56 for small images, 0.85 million parameters at 10 classes; see `cifar_resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return cifar_resnet(56, classes, preactivation=preactivation, **options)


def resnet110(
    classes: int,
    *,
    preactivation: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-110 for small images, 1.7 million parameters at 10 classes; see `cifar_resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return cifar_resnet(110, classes, preactivation=preactivation, **options)
