"""Residual nets for ImageNet: ResNet-18 to 152 and wide ones, also with a stem for small images."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, or a bottleneck 1×1, 3×3, 1×1 with the stride on the 3×3 ("v1.5").

    The shortcut is a strided 1×1 convolution with batch norm where the shape changes.
    """

    filters: int
    stride: int
    bottleneck: bool
    layers: Layers
    wider: int = 1

    @nn.compact
    def __call__(self, x):
        """Returns the block's maps [B, H / stride, W / stride, filters (times 4 in a bottleneck)]."""
        n, s = self.filters, self.stride
        inside = self.wider * n
        plan = [(inside, 1, 1), (inside, 3, s), (4 * n, 1, 1)] if self.bottleneck else [(n, 3, s), (n, 3, 1)]
        y = x
        for i, (filters, size, stride) in enumerate(plan, 1):
            y = self.layers.conv(filters, size, stride=stride, name=f"conv{i}")(y)
            y = self.layers.norm(f"norm{i}")(y)
            y = nn.relu(y) if i < len(plan) else y
        if s != 1 or x.shape[-1] != y.shape[-1]:
            x = self.layers.conv(y.shape[-1], 1, stride=s, name="shortcut_conv")(x)
            x = self.layers.norm("shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Four stages of residual blocks with 64, 128, 256 and 512 filters (times 4 behind bottlenecks)."""

    depth: int
    classes: int
    small_images: bool = False
    wider: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: `stem`, `stage1` ... `stage4`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis, self.remat)
        size, stride = (3, 1) if self.small_images else (7, 2)
        x = layers.conv(64, size, stride=stride, name="stem_conv")(x)
        x = nn.relu(layers.norm("stem_norm")(x))
        if not self.small_images:
            padding: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        outputs = {"stem": x}
        for stage, blocks in enumerate(BLOCKS[self.depth], 1):
            for i in range(1, blocks + 1):
                stride = 2 if stage > 1 and i == 1 else 1
                name = f"stage{stage}_block{i}"
                kind = layers.block(ResidualBlock, self)
                x = kind(32 * 2**stage, stride, self.depth >= 50, layers, self.wider, name=name)(x)
            outputs[f"stage{stage}"] = x
        features = global_avg_pool(x)
        return outputs | {"features": features, "logits": layers.logits(features, self.classes)}


@recorded
def resnet(
    depth: int,
    classes: int,
    *,
    small_images: bool = False,
    wider: int = 1,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns a residual net (He et al. 2016, arXiv 1512.03385), bottlenecks as in torchvision ("v1.5").

    Args:
      depth: number of layers, 18, 34, 50, 101 or 152.
      classes: number of outputs.
      small_images: for images of about 32×32 the stem is a 3×3 convolution of stride 1; otherwise it is a
        7×7 convolution of stride 2 and a 3×3 max pooling of stride 2.
      wider: how many times as many filters the inner two convolutions of a bottleneck have (Zagoruyko, Komodakis 2016,
        arXiv 1605.07146); nets of 50 layers or more have bottlenecks.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
      remat: compute each block anew in the backward pass: less memory, about a third more time.
    """
    if depth not in BLOCKS:
        raise InputError(f"expected a depth of {', '.join(map(str, BLOCKS))} layers; got {depth}")
    if wider < 1 or (wider > 1 and depth < 50):
        raise InputError(f"expected wider of 1, or more from 50 layers on, where bottlenecks are; got {wider}")
    module = ResNet(depth, classes, small_images, wider, dtype=dtype, param_dtype=param_dtype, remat=remat)
    return linen(module, name=name, stages=("stem_.*", *(f"stage{i}_.*" for i in range(1, 5)), "head"))


def resnet18(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-18, 11.7 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(18, classes, small_images=small_images, **options)


def resnet34(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-34, 21.8 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(34, classes, small_images=small_images, **options)


def resnet50(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-50, 25.6 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(50, classes, small_images=small_images, **options)


def resnet101(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-101, 44.5 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(101, classes, small_images=small_images, **options)


def resnet152(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-152, 60.2 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(152, classes, small_images=small_images, **options)


def wide_resnet50_2(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-50 twice as wide in its bottlenecks, 68.9 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(50, classes, small_images=small_images, wider=2, **options)


def wide_resnet101_2(
    classes: int,
    *,
    small_images: bool = False,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ResNet-101 twice as wide in its bottlenecks, 126.9 million parameters at 1000 classes; see `resnet`."""
    options = {"name": name, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return resnet(101, classes, small_images=small_images, wider=2, **options)
