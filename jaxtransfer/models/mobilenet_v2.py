"""MobileNet-v2: inverted residuals, the widest at the end."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.inverted_residual import InvertedResidual, by_eight, relu6
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded

STAGES = (  # blocks, stride, times wider inside, filters
    (1, 1, 1, 16),
    (2, 2, 6, 24),
    (3, 2, 6, 32),
    (4, 2, 6, 64),
    (3, 1, 6, 96),
    (3, 2, 6, 160),
    (1, 1, 6, 320),
)
EPSILON = 1e-5


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals, and a 1×1 convolution to 1280 maps, or more in wider ones."""

    classes: int
    width: float = 1.0
    dropout: float = 0.2
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: `stem`, `stage1` ... `stage7`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)
        x = layers.conv(by_eight(32 * self.width), 3, stride=2, name="stem_conv")(x)
        x = relu6(layers.norm("stem_norm")(x))
        outputs = {"stem": x}
        for stage, (blocks, stride, wider, filters) in enumerate(STAGES, 1):
            for number in range(1, blocks + 1):
                x = InvertedResidual(
                    *(by_eight(filters * self.width), 3, stride if number == 1 else 1, wider, layers, False, EPSILON),
                    name=f"stage{stage}_block{number}",
                )(x)
            outputs[f"stage{stage}"] = x
        x = layers.conv(by_eight(1280 * max(1.0, self.width)), 1, name="final_conv")(x)
        features = global_avg_pool(relu6(layers.norm("final_norm")(x)))
        logits = layers.logits(layers.dropout(self.dropout)(features), self.classes)
        return outputs | {"features": features, "logits": logits}


@recorded
def mobilenet_v2(
    classes: int,
    *,
    width: float = 1.0,
    dropout: float = 0.2,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns MobileNet-v2 (Sandler et al. 2018, arXiv 1801.04381), 3.5 million parameters at 1000 classes.

    Args:
      classes: number of outputs.
      width: how many times wider than the paper's all layers are, 0.5 or 1.4 say, to multiples of eight; the last
        convolution is never narrower.
      dropout: rate before the head.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    if not width > 0:
        raise InputError(f"mobilenet_v2: expected a width above 0, as 1.0 is the paper's; got {width!r}")
    module = MobileNetV2(classes, width, dropout, dtype=dtype, param_dtype=param_dtype)
    last = len(STAGES)
    stages = (*(f"stage{i}_.*" for i in range(1, last)), f"stage{last}_.*|final_.*")
    return linen(module, name=name, stages=("stem_.*", *stages, "head"))
