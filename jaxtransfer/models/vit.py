"""Vision transformers of three sizes."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers, check_images
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded


class EncoderBlock(nn.Module):
    """Self-attention, then a perceptron of four times the width, each on normalised tokens and added."""

    heads: int
    dropout: float
    layers: Layers

    @nn.compact
    def __call__(self, x):
        """Returns the tokens [B, N, D] after the block."""
        layers, width = self.layers, x.shape[-1]
        types = {"dtype": layers.dtype, "param_dtype": layers.param_dtype}
        y = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm1", **types)(x)
        low = jnp.promote_types(y.dtype, jnp.float32) != y.dtype
        attention = nn.MultiHeadDotProductAttention(self.heads, force_fp32_for_softmax=low, name="attention", **types)
        x = x + layers.dropout(self.dropout)(attention(y))
        y = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm2", **types)(x)
        y = nn.gelu(layers.dense(4 * width, "fc1")(y), approximate=False)
        y = layers.dense(width, "fc2")(layers.dropout(self.dropout)(y))
        return x + layers.dropout(self.dropout)(y)


class ViT(nn.Module):
    """A transformer over patches and a class token, with a learned position embedding."""

    width: int
    depth: int
    heads: int
    classes: int
    patch: int = 16
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train: bool = False):
        """Returns the outputs for `x` [B, H, W, C]: tokens `stem`, `stage1` ..., features and logits."""
        check_images(x)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise InputError(f"expected images divisible into {self.patch}×{self.patch} patches; got {x.shape}")
        layers = Layers(train, self.dtype, self.param_dtype, self.axis, self.remat)
        size = (self.patch, self.patch)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="stem_conv", **types)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("stem_token", nn.initializers.zeros, (1, 1, self.width), self.param_dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(x.dtype), x], axis=1)
        shape = (1, *x.shape[1:])
        position = self.param("stem_position", nn.initializers.normal(0.02), shape, self.param_dtype)
        x = layers.dropout(self.dropout)(x + position.astype(x.dtype))
        outputs = {"stem": x}
        for i in range(1, self.depth + 1):
            block = layers.block(EncoderBlock, self)(self.heads, self.dropout, layers, name=f"stage{i}")
            outputs[f"stage{i}"] = x = block(x)
        features = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="final_norm", **types)(x)[:, 0]
        return outputs | {"features": features, "logits": layers.logits(features, self.classes)}


@recorded
def vit(
    width: int,
    depth: int,
    heads: int,
    classes: int,
    *,
    patch: int = 16,
    dropout: float = 0.0,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

    The features are the normalised class token. Each block is a stage, so that `stem` and `stage1`, ... are
    tokens [B, 1 + N, D], class token first. The position embedding fits one image size.

    Args:
      width: width D of the tokens.
      depth: number of blocks.
      heads: number of attention heads, a divisor of the width.
      classes: number of outputs.
      patch: side of the patches; 4 suits 32×32 images.
      dropout: rate behind the embedding, the attention and the layers of the perceptrons.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
      remat: compute each block anew in the backward pass: less memory, about a third more time.
    """
    if width % heads:
        raise InputError(f"expected a number of heads that divides the width {width}; got {heads}")
    module = ViT(width, depth, heads, classes, patch, dropout, dtype=dtype, param_dtype=param_dtype, remat=remat)
    blocks = [f"stage{i}" for i in range(1, depth + 1)]
    return linen(module, name=name, stages=("stem_.*", *blocks[:-1], f"{blocks[-1]}|final_norm", "head"))


def vit_ti(
    classes: int,
    *,
    patch: int = 16,
    dropout: float = 0.0,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ViT-Ti: 12 blocks of width 192 with 3 heads, 5.7 million parameters; see `vit`."""
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return vit(192, 12, 3, classes, patch=patch, dropout=dropout, name=name, remat=remat, **types)


def vit_s(
    classes: int,
    *,
    patch: int = 16,
    dropout: float = 0.0,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ViT-S: 12 blocks of width 384 with 6 heads, 22.1 million parameters; see `vit`."""
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return vit(384, 12, 6, classes, patch=patch, dropout=dropout, name=name, remat=remat, **types)


def vit_b(
    classes: int,
    *,
    patch: int = 16,
    dropout: float = 0.0,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns ViT-B: 12 blocks of width 768 with 12 heads, 86.6 million parameters; see `vit`."""
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return vit(768, 12, 12, classes, patch=patch, dropout=dropout, name=name, remat=remat, **types)
