"""A multilayer perceptron."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


class MLP(nn.Module):
    """Linear layers with ReLU between them, on flattened inputs."""

    classes: int
    hidden: Sequence[int] = (256, 256)
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, ...]: the hidden layers `stage1`, ..., features and logits."""
        if jnp.ndim(x) < 2:
            raise InputError(f"expected a batch of inputs of shape [B, ...]; got shape {jnp.shape(x)}")
        layers = Layers(train, self.dtype, self.param_dtype, self.axis)
        outputs = {}
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden, 1):
            outputs[f"stage{i}"] = x = nn.relu(layers.dense(width, f"stage{i}")(x))
        return outputs | {"features": x, "logits": layers.logits(x, self.classes)}


@recorded
def mlp(
    classes: int,
    *,
    hidden: Sequence[int] = (256, 256),
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
) -> Model:
    """Returns a multilayer perceptron with ReLU; with `hidden=()` it is a linear classifier.

    Args:
      classes: number of outputs.
      hidden: widths of the hidden layers.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
    """
    module = MLP(classes, tuple(hidden), dtype=dtype, param_dtype=param_dtype)
    stages = tuple(f"stage{i}" for i in range(1, len(module.hidden) + 1))
    return linen(module, name=name, stages=(*stages, "head"))
