"""EfficientNet-Lite: inverted residuals without squeezing, for devices that want plain operations."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.inverted_residual import InvertedResidual, by_eight, relu6
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool, he_normal
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded

STAGES = (  # blocks, kernel, stride, times wider inside, filters
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIZES = {0: (1.0, 1.0, 0.2), 1: (1.0, 1.1, 0.2), 2: (1.1, 1.2, 0.3)}  # times wider, times deeper, dropout


class EfficientNetLite(nn.Module):
    """A stem, seven stages of inverted residuals, and a 1×1 convolution to 1280 maps."""

    variant: int
    classes: int
    same: bool = True
    dropout: float = 0.2
    epsilon: float = 1e-3
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: `stem`, `stage1` ... `stage7`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": he_normal}
        padding: Any = "SAME" if self.same else ((1, 1), (1, 1))
        x = nn.Conv(32, (3, 3), strides=(2, 2), padding=padding, use_bias=False, name="stem_conv", **types)(x)
        x = relu6(layers.norm("stem_norm", epsilon=self.epsilon)(x))
        outputs = {"stem": x}
        for stage, (blocks, size, stride, wider, filters) in enumerate(_plan(self.variant), 1):
            for number in range(1, blocks + 1):
                x = InvertedResidual(
                    *(filters, size, stride if number == 1 else 1, wider, layers, self.same, self.epsilon),
                    name=f"stage{stage}_block{number}",
                )(x)
            outputs[f"stage{stage}"] = x
        x = layers.conv(1280, 1, name="final_conv")(x)
        features = global_avg_pool(relu6(layers.norm("final_norm", epsilon=self.epsilon)(x)))
        logits = layers.logits(layers.dropout(self.dropout)(features), self.classes)
        return outputs | {"features": features, "logits": logits}


@recorded
def efficientnet_lite(
    variant: int,
    classes: int,
    *,
    same_padding: bool = True,
    dropout: float | None = None,
    epsilon: float = 1e-3,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns EfficientNet-Lite (Tan, Le 2019, arXiv 1905.11946, without squeezing and with ReLU6).

    Args:
      variant: 0, 1 or 2; made for images of 224, 240 and 260 pixels.
      classes: number of outputs.
      same_padding: whether a layer with a stride pads as TensorFlow does, more behind than before where the two differ,
        as the published weights want; otherwise alike on both sides, as timm's own do.
      dropout: rate before the head; None for the paper's.
      epsilon: of batch norm, added to the variance: 1e-3 in TensorFlow's weights, 1e-5 in timm's own.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    if variant not in SIZES:
        raise InputError(f"expected EfficientNet-Lite {', '.join(map(str, SIZES))}; got {variant!r}")
    rate = SIZES[variant][2] if dropout is None else dropout
    module = EfficientNetLite(variant, classes, same_padding, rate, epsilon, dtype=dtype, param_dtype=param_dtype)
    last = len(STAGES)
    stages = (*(f"stage{i}_.*" for i in range(1, last)), f"stage{last}_.*|final_.*")
    return linen(module, name=name, stages=("stem_.*", *stages, "head"))


def efficientnet_lite0(
    classes: int,
    *,
    same_padding: bool = True,
    dropout: float | None = None,
    epsilon: float = 1e-3,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns EfficientNet-Lite0, 4.7 million parameters at 1000 classes; see `efficientnet_lite`."""
    return efficientnet_lite(
        *(0, classes),
        same_padding=same_padding,
        dropout=dropout,
        epsilon=epsilon,
        name=name,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def _plan(variant: int):
    """Yields the stages of a variant; the first and the last keep their blocks, stem and head their width."""
    width, depth, _ = SIZES[variant]
    for number, (blocks, size, stride, wider, filters) in enumerate(STAGES):
        ends = number in (0, len(STAGES) - 1)
        yield blocks if ends else math.ceil(depth * blocks), size, stride, wider, by_eight(width * filters)
