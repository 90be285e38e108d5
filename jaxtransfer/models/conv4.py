"""Conv4, the four-layer backbone of few-shot learning."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.model import Model
from jaxtransfer.models.convolution import Conv
from jaxtransfer.models.layers import Layers, check_images, halve, he_normal
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


class Conv4(nn.Module):
    """Four times 3×3 convolution, batch norm, ReLU, 2×2 max pooling; then a linear layer on the flat map."""

    classes: int
    width: int = 64
    pooling: bool = True
    norm: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for images `x` [B, H, W, C]: `stage1` ... `stage4`, features and logits."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)
        outputs = {}
        for i in range(1, 5):
            x = Conv(
                self.width,
                stride=1 if self.pooling else 2,
                kernel_init=he_normal,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"stage{i}_conv",
            )(x)
            x = nn.relu(layers.local_norm(f"stage{i}_norm")(x) if self.norm else x)
            outputs[f"stage{i}"] = x = halve(x) if self.pooling else x
        features = x.reshape(x.shape[0], -1)
        return outputs | {"features": features, "logits": layers.logits(features, self.classes)}


@recorded
def conv4(
    classes: int,
    *,
    width: int = 64,
    pooling: bool = True,
    norm: bool = True,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns Conv4 (Vinyals et al. 2016, arXiv 1606.04080; Finn et al. 2017, arXiv 1703.03400).

    The few-shot papers normalise with the statistics of the batch at test time as well: call it with
    `train=True` for that. Pooling stops once a side of the map is 1, so that 8×8 images fit too.

    Args:
      classes: number of outputs (the ways of an episode).
      width: filters per layer; 64 for Omniglot, 32 for miniImageNet in Finn et al.
      pooling: False gives the strided form: convolutions of stride 2, no pooling.
      norm: whether there is batch norm; without it the model has no state.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    module = Conv4(classes, width, pooling, norm, dtype=dtype, param_dtype=param_dtype)
    return linen(module, name=name, stages=(*(f"stage{i}_.*" for i in range(1, 5)), "head"))
