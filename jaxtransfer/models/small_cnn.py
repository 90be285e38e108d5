"""A tiny convolutional net, fast on a CPU."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers, check_images, global_avg_pool, halve
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


class SmallCNN(nn.Module):
    """Three 3×3 convolutions with batch norm and ReLU, a pooling after the second, a global mean, a head."""

    classes: int
    width: int = 16
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for images `x` [B, H, W, C]: `stem`, `stage1`, `stage2`, features, logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)

        def block(x, filters, name):
            x = layers.conv(filters, name=f"{name}_conv")(x)
            return nn.relu(layers.norm(f"{name}_norm")(x))

        stem = block(x, self.width, "stem")
        stage1 = halve(block(stem, 2 * self.width, "stage1"))
        stage2 = block(stage1, 4 * self.width, "stage2")
        features = global_avg_pool(stage2)
        logits = layers.logits(features, self.classes)
        return {"stem": stem, "stage1": stage1, "stage2": stage2, "features": features, "logits": logits}


@recorded
def small_cnn(
    classes: int,
    *,
    width: int = 16,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns a convolutional net for images of 8×8 to 32×32 pixels; 24 thousand parameters at width 16.

    Args:
      classes: number of outputs.
      width: filters of the first layer; the next two have twice and four times as many.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    module = SmallCNN(classes, width, dtype=dtype, param_dtype=param_dtype)
    return linen(module, name=name, stages=("stem_.*", "stage1_.*", "stage2_.*", "head"))
