"""Ladder side-tuning: a narrow network that reads the maps of a frozen one, block by block."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.composition import composed
from jaxtransfer.models.frozen_base import BASE, fixed
from jaxtransfer.models.layers import global_avg_pool
from jaxtransfer.models.linen import linen
from jaxtransfer.models.side_tuning import new_head
from jaxtransfer.models.text_inputs import POOLINGS, TextInputs

_WHAT, _TEMPERATURE = "ladder", 0.1
_MAPS = re.compile(r"stem|stage\d+")
_MANY = 2**31 - 1


class SideBlock(nn.Module):
    """A block of the side network: attention and a perceptron over tokens, or two convolutions over maps."""

    heads: int

    @nn.compact
    def __call__(self, x, mask):
        """Returns `x` [B, N, D] or [B, H, W, C] after the block; `mask` [B, N] says to which tokens others attend."""

        def norm(name):
            return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)

        width = x.shape[-1]
        if x.ndim == 4:
            y = nn.relu(nn.Conv(width, (3, 3), name="conv1")(norm("norm1")(x)))
            return x + nn.Conv(width, (3, 3), name="conv2")(y)
        attended = None if mask is None else mask[:, None, None, :]
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(norm("norm1")(x), mask=attended)
        y = nn.gelu(nn.Dense(4 * width, name="fc1")(norm("norm2")(x)), approximate=False)
        return x + nn.Dense(width, name="fc2")(y)


class Ladder(nn.Module):
    """The side network, and a linear layer from it back to the width of the last map."""

    reduction: int
    heads: int
    pooling: str

    @nn.compact
    def __call__(self, seen):
        """Returns the `features` of `seen`: the maps, a tuple from the input on, and the tokens' mask or None."""
        maps, mask = seen
        h = None
        for number, x in enumerate(maps):
            width = x.shape[-1] // self.reduction
            if x.ndim == 3 and width % self.heads:
                raise InputError(f"{_WHAT}: {self.heads} heads don't divide the width {width} of the side network")
            x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            low = nn.Dense(width, name=f"down{number}")(x)
            if h is None:
                h = low
                continue
            if h.shape != low.shape:
                h = nn.Dense(width, name=f"pass{number}")(h)
                h = jax.image.resize(h, low.shape, "linear")  # smoothed where it shrinks
            gate = nn.sigmoid(self.param(f"gate{number}", nn.initializers.zeros, ()) / _TEMPERATURE)
            h = SideBlock(self.heads, name=f"block{number}")(gate * low + (1 - gate) * h, mask)
        h = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm")(h)
        if h.ndim == 4:
            pooled = global_avg_pool(h)
        else:
            pooled = POOLINGS[self.pooling](h, jnp.ones(h.shape[:2], bool) if mask is None else mask)
        return {"features": nn.Dense(maps[-1].shape[-1], name="up")(pooled)}


class Added(nn.Module):
    """A linear map of vectors that starts as zeros, added to logits."""

    @nn.compact
    def __call__(self, pair):
        """Returns the sum for `pair`: vectors [B, D] and logits [B, C]."""
        x, logits = pair
        return {"output": logits + nn.Dense(logits.shape[-1], kernel_init=nn.initializers.zeros, name="dense")(x)}


def ladder(
    model: Model,
    base: Any,
    *,
    maps: tuple[str, ...] = (),
    classes: int | None = None,
    reduction: int = 8,
    heads: int = 1,
    pooling: str = "class",
) -> Model:
    """Returns a frozen network and a narrow one beside it that reads its maps: ladder side-tuning.

    (Sung et al. 2022, arXiv:2206.06522.) With x_i the i-th map of the frozen network f and D_i a linear layer to a
    `reduction`-th of its width,

        h_0 = D_0 x_0,    h_i = block_i(μ_i D_i x_i + (1 − μ_i) h_{i−1}),    μ_i = sigmoid(α_i / 0.1), α_i = 0 at first

    and the features are U pool(norm(h)), of f's width again. Blocks are of pre-normalised attention and a perceptron on
    tokens, of two 3×3 convolutions on maps [B, H, W, C], where h is resized from stage to stage. No gradient enters f:
    its activations are not kept, and the backward pass is the small network's. In the paper blocks start from pruned
    weights of f; here they are drawn.

        net = jt.models.ladder(loaded.model, loaded.variables, classes=20, heads=3)

    Args:
      model: any that names its maps, of any library.
      base: its weights, which stay: variables, a training state, or a handle `jt.Frozen` on variables.
      maps: names of the maps, from the input on; `stem`, `stage1`, ... by default, those that there are.
      classes: outputs of a new linear head on the features; None for f's logits plus a linear map of the features that
        starts as zeros: the base's function at the start, to the bit.
      reduction: how many times narrower the side network is; 8 in the paper.
      heads: of its attention.
      pooling: of tokens, "class" or "mean".

    Returns:
      The model. Its parameters are `side` and `head`; its outputs f's, with the side network's `features` and the new
      `logits`. On ViT-Ti with the defaults and 10 classes that is 153,694 parameters.

    Raises:
      InputError: for arguments out of range; at init, for maps that the base has not, or of other shapes.
    """
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    if isinstance(maps, str) or (maps and len(maps) < 2):
        raise InputError(f"{_WHAT} reads a tuple of two maps or more; got {maps!r}")
    for name, value in {"reduction": reduction, "heads": heads}.items():
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{_WHAT}: {name} must be a whole number of at least 1; got {value!r}")
    parts = {
        BASE: fixed(model, base, _WHAT),
        "side": linen(Ladder(reduction, heads, pooling), name="side"),
        "head": linen(Added(), name="head") if classes is None else new_head(classes, _WHAT),
    }

    def run(call, inputs):
        outputs = dict(call(BASE, inputs))
        seen = _chosen(outputs, maps, reduction, model.name)
        outputs["features"] = call("side", (seen, _mask_of(inputs, seen[0])))["features"]
        if classes is None and "logits" not in outputs:
            raise unknown(f"output of {model.name!r}", "logits", outputs)
        vectors = (outputs["features"], outputs["logits"]) if classes is None else outputs["features"]
        outputs["logits"] = call("head", vectors)["output"]
        return outputs

    return composed(model, parts, run, stages=("side", "head"))


def _chosen(outputs: Mapping[str, Any], maps: tuple[str, ...], reduction: int, model: str) -> tuple[Any, ...]:
    """Returns the maps that the side network reads, from the input on; refuses what it can't."""
    names = maps or sorted(filter(_MAPS.fullmatch, outputs), key=lambda name: int(name.strip("stagem") or 0))
    if len(names) < 2:
        raise InputError(
            f"{_WHAT} reads the maps stem, stage1, ... of a network, but {model!r} gives {', '.join(sorted(outputs))}; "
            f"name two or more in maps"
        )
    for name in names:
        if name not in outputs:
            raise unknown(f"output of {model!r}", name, outputs)
        shape = outputs[name].shape
        if len(shape) not in (3, 4) or len(shape) != len(outputs[names[0]].shape):
            raise InputError(f"{_WHAT} reads tokens [B, N, D], or maps [B, H, W, C]; {name!r} is {shape}")
        if shape[-1] < reduction:
            raise InputError(f"{_WHAT}: the map {name!r} has a width of {shape[-1]}, less than reduction={reduction}")
    return tuple(outputs[name] for name in names)


def _mask_of(inputs: Any, tokens: Any) -> Any:
    """Returns where there are tokens, for inputs of texts; None for others."""
    words: Any = inputs.get("tokens") if isinstance(inputs, Mapping) else inputs
    if not hasattr(words, "dtype") or words.shape != tokens.shape[:2] or not jnp.issubdtype(words.dtype, jnp.integer):
        return None
    return TextInputs.of(inputs, vocabulary=_MANY, positions=_MANY, types=_MANY).mask
