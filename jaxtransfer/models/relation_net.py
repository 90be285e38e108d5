"""The network that compares a query with a class in relation networks."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.model import Model
from jaxtransfer.models.convolution import Conv
from jaxtransfer.models.layers import Layers, check_images, halve, he_normal
from jaxtransfer.models.linen import linen


class RelationNet(nn.Module):
    """Twice 3×3 convolution, batch norm, ReLU, 2×2 max pooling; then two linear layers with ReLU between them."""

    width: int = 64
    hidden: int = 8
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for pairs of maps `x` [B, h, w, 2C]: `stage1`, `stage2`, features and logits [B, 1]."""
        check_images(x)
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        outputs = {}
        for i in range(1, 3):
            x = Conv(self.width, kernel_init=he_normal, **types, name=f"stage{i}_conv")(x)
            outputs[f"stage{i}"] = x = halve(nn.relu(layers.local_norm(f"stage{i}_norm")(x)))
        features = nn.relu(layers.dense(self.hidden, "hidden")(x.reshape(x.shape[0], -1)))
        return outputs | {"features": features, "logits": layers.logits(features, 1)}


def relation_net(
    width: int = 64,
    hidden: int = 8,
    *,
    name: str = "relation",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns the relation module of Sung et al. 2018 (arXiv 1711.06025), without the sigmoid at its end.

    Pooling stops once a side of the map is 1.

    Args:
      width: filters per convolution.
      hidden: units of the hidden linear layer.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    module = RelationNet(width, hidden, dtype=dtype, param_dtype=param_dtype)
    return linen(module, name=name, stages=("stage1_.*", "stage2_.*", "hidden", "head"))
