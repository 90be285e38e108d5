"""LeNet, the network of digit adaptation."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.convolution import ConvHalve
from jaxtransfer.models.layers import Layers, check_images
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


class LeNet(nn.Module):
    """Two 5×5 convolutions, each with 2×2 max pooling and ReLU, a hidden layer of 500 units, a head."""

    classes: int
    bottleneck: int = 0
    dropout: float = 0.5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for images `x` [B, H, W, C]: `stage1`, `stage2`, `hidden`, features, logits."""
        check_images(x)
        if min(jnp.shape(x)[1:3]) < 16:
            raise InputError(f"LeNet takes images of 16×16 pixels and more; got shape {jnp.shape(x)}")
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)

        def convolved(x, filters, name):
            return ConvHalve(filters, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

        stage1 = nn.relu(convolved(x, 20, "stage1_conv"))
        # Whole maps are dropped, as in the original before pooling, where it comes to the same.
        maps = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)
        stage2 = nn.relu(maps(convolved(stage1, 50, "stage2_conv")))
        hidden = nn.relu(layers.dense(500, "hidden")(stage2.reshape(x.shape[0], -1)))
        features = hidden = layers.dropout(self.dropout)(hidden)
        if self.bottleneck:
            features = layers.dense(self.bottleneck, "bottleneck_fc")(hidden)
            features = nn.relu(layers.norm("bottleneck_norm")(features))
        outputs = {"stage1": stage1, "stage2": stage2, "hidden": hidden, "features": features}
        return outputs | {"logits": layers.logits(features, self.classes)}


@recorded
def lenet(
    classes: int,
    *,
    bottleneck: int = 0,
    dropout: float = 0.5,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns LeNet as the field's digit adaptation has it: 431 thousand parameters for 28×28 images of one channel.

    After LeCun et al. 1998 in the widths of Caffe's example (20 and 50 filters, 500 units), with dropout after the
    second convolution (whole maps) and the hidden layer, as in the Transfer-Learning-Library of Jiang et al. 2022
    (arXiv 2201.05867).

    Args:
      classes: number of outputs.
      bottleneck: units of a further layer with batch norm and ReLU before the head, 0 for none; that library's
        adaptation methods put one of 256 there. Then it gives the features, otherwise the hidden layer does.
      dropout: rate of both dropouts.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.

    Raises:
      InputError: at init, for images smaller than 16×16.
    """
    module = LeNet(classes, bottleneck, dropout, dtype=dtype, param_dtype=param_dtype)
    further = ("bottleneck_.*",) if bottleneck else ()
    return linen(module, name=name, stages=("stage1_.*", "stage2_.*", "hidden", *further, "head"))
