"""Side-tuning: a small network beside a frozen one, whose outputs are blended or added."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.composition import composed
from jaxtransfer.models.frozen_base import BASE, fixed
from jaxtransfer.models.linen import linen

_WHAT = "side_tuning"


class Merge(nn.Module):
    """What two networks give, as one: α · f + (1 − α) · g, or f + g W."""

    alpha: float | None

    @nn.compact
    def __call__(self, pair):
        """Returns the merged arrays of `pair`, (f, g), of one shape but for the last axis."""
        f, g = pair
        if f.shape[:-1] != g.shape[:-1]:
            raise InputError(f"{_WHAT}: the base gives {f.shape} and the side network {g.shape}; name another output")
        kind = jnp.promote_types(f.dtype, jnp.float32)
        if self.alpha is None:
            zeros = nn.initializers.zeros
            return {"output": f + nn.Dense(f.shape[-1], kernel_init=zeros, name="out", dtype=kind)(g).astype(f.dtype)}
        if f.shape[-1] != g.shape[-1]:
            g = nn.Dense(f.shape[-1], name="out", dtype=kind)(g)
        start = math.log(self.alpha / (1 - self.alpha))
        alpha = nn.sigmoid(self.param("alpha", nn.initializers.constant(start), ()))
        return {"output": (alpha * f.astype(kind) + (1 - alpha) * g.astype(kind)).astype(f.dtype)}


def side_tuning(
    model: Model, base: Any, side: Model, *, classes: int | None = None, alpha: float | None = 0.5
) -> Model:
    """Returns a frozen network f and a small one g beside it on the same inputs: side-tuning.

    (Zhang et al. 2020, arXiv:1912.13503.) R(x) = α f(x) + (1 − α) g(x), where α is the sigmoid of a parameter; with
    `alpha=None` R(x) = f(x) + g(x) W, W zeros at first, which starts as the base, to the bit. No gradient enters f.

        net = jt.models.side_tuning(loaded.model, loaded.variables, jt.models.small_cnn(1), classes=20)

    Args:
      model: any, of any library.
      base: its weights, which stay: variables, a training state, or a handle `jt.Frozen` on variables.
      side: g, all of which trains; it may start from weights of its own, a distilled copy of f in the paper: they are
        `params["side"]`. Where its outputs have another width than f's, a linear layer brings them to that. With
        `classes` nothing reads its own head.
      classes: outputs of a new linear head on R of the `features`; None for R of the `logits`.
      alpha: where α starts, between 0 and 1: the closer to 1, the closer to the base's function. None for the sum.

    Returns:
      The model. Its parameters are `side`, `merge`, and `head` with `classes`; its outputs those of f with R for the
      features or logits. A ResNet-20 beside a network of 64 features: 269,722 + 1, and 650 with `classes=10`.

    Raises:
      InputError: for α outside of (0, 1), a base that doesn't fit; at init, for networks without such outputs.
    """
    if alpha is not None and not 0 < alpha < 1:
        raise InputError(f"{_WHAT}: alpha must lie between 0 and 1, or be None for f + g; got {alpha}")
    output = "logits" if classes is None else "features"
    parts = {BASE: fixed(model, base, _WHAT), "side": side, "merge": linen(Merge(alpha), name="merge")}
    if classes is not None:
        parts["head"] = new_head(classes, _WHAT)

    def read(outputs, of):
        if output not in outputs:
            raise unknown(f"output of {of.name!r}", output, outputs)
        return outputs[output]

    def run(call, inputs):
        outputs = dict(call(BASE, inputs))
        pair = read(outputs, model), read(call("side", inputs), side)
        outputs[output] = call("merge", pair)["output"]
        if classes is not None:
            outputs["logits"] = call("head", outputs[output])["output"]
        return outputs

    inside = tuple(f"side/(?:{stage})" for stage in side.stages or (".*",))
    last = ("merge|head",) if classes is not None else ("merge",)
    return composed(model, parts, run, stages=(*inside, *last))


def new_head(classes: int, what: str) -> Model:
    """Returns a linear layer on vectors, in float32 at least.

    Args:
      classes: number of outputs.
      what: who asks, for errors.
    """
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise InputError(f"{what}: classes must be a whole number of at least 1, or None; got {classes!r}")
    return linen(Head(classes), name="head")


class Head(nn.Module):
    """See `new_head`."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Returns the outputs [B, classes] for `x` [B, D]."""
        kind = jnp.promote_types(x.dtype, jnp.float32)
        return {"output": nn.Dense(self.classes, dtype=kind, name="dense")(x)}
