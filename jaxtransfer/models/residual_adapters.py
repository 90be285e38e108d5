"""Residual adapters: 1×1 convolutions behind or beside the convolutions of a frozen network."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.inserts import Drawn, Hook, Insert, Leaves, inserted

_WHAT = "residual_adapters"


def residual_adapters(
    model: Model, base: Any, *, parallel: bool = True, only: tree.Patterns = (), own: tree.Patterns = ()
) -> Model:
    """Returns a convolutional network with a 1×1 convolution α at each of its convolutions f.

    (Rebuffi et al. 2018, "Efficient parametrization of multi-domain deep neural networks", arXiv:1803.10082.)

        parallel: f ∗ x + α ∗ x        series: y + α ∗ y, y = f ∗ x        (2017, arXiv:1705.08045)

    α has no bias and begins as zeros (the papers draw it), so that the network starts as the base, to the bit. The
    papers give each domain batch norm of its own: `own="head|.*norm.*"`; without, that of the base normalises by its
    running statistics. Behind the series form's α the released code has batch norm; here, as in the formula, none.

        net = jt.models.residual_adapters(loaded.model, loaded.variables, own="head|.*norm.*")

    Args:
      model: of `jt.models`, a ResNet say; it may have another head than the base.
      base: the weights that stay: variables, a training state, or a handle `jt.Frozen` on variables.
      parallel: beside the convolution; else behind it, in series.
      only: path patterns of the convolutions; by default all that are larger than 1×1, but for the first stage's. The
        parallel form adds C_in · C_out parameters for each, the series form C_out².
      own: path patterns of parameters that train beside; they start from the base, or anew where it has none of the
        shape. Batch norm of its own has running statistics of its own.

    Returns:
      The model. Its parameters are `<convolution>_adapter/kernel` [C, C'], and its own; the base is in `frozen`. In a
      ResNet-20 that is 29,696 parallel or 32,256 in series, of 0.27 million.

    Raises:
      InputError: for a base without such convolutions, the message names what was looked for; when called, for the
        parallel form beside convolutions in groups, dilated ones, and those whose output is not a strided map's.
    """

    def insert(params: Mapping[str, Any]) -> Insert:
        kernels = _kernels(params, only, model.stages[:-1][:1])
        drawn = {}
        for path, shape in kernels.items():
            drawn[f"{path}_adapter/kernel"] = Drawn(nn.initializers.zeros, (shape[2 if parallel else 3], shape[3]))

        def hooks(leaves: Leaves) -> dict[str, Hook]:
            make = _parallel if parallel else _series
            return {path: make(path, leaves[f"{path}_adapter/kernel"]) for path in kernels}

        return Insert(drawn, hooks)

    return inserted(model, base, _WHAT, insert, own)


def _kernels(params: Mapping[str, Any], only: tree.Patterns, first: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the kernels of the convolutions, by the layer's path."""
    convolutions = {
        path.rpartition("/")[0]: tuple(leaf.shape)
        for path, leaf in params.items()
        if path.endswith("/kernel") and len(leaf.shape) == 4
    }
    if only and convolutions:
        tree.check_used(only, convolutions, f"{_WHAT}, only")
        return {path: shape for path, shape in convolutions.items() if tree.matches(path, only)}
    chosen = {
        path: shape for path, shape in convolutions.items() if max(shape[:2]) > 1 and not tree.matches(path, first)
    }
    if not chosen:
        raise InputError(
            f"{_WHAT} needs convolutions larger than 1×1 behind the first stage, layers with a kernel [k, k, C, C']; "
            f"the base has {tree.listed(convolutions or params, limit=6)}. Name others in only"
        )
    return chosen


def _by_points(x: jax.Array, kernel: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, kernel.dtype))
    return (wide @ kernel).astype(x.dtype)


def _series(path: str, kernel: jax.Array) -> Hook:
    def hook(layer, call, x):
        y = call(x)
        return y + _by_points(y, kernel)

    return hook


def _parallel(path: str, kernel: jax.Array) -> Hook:
    def hook(layer, call, x):
        y = call(x)
        strides = getattr(layer, "strides", getattr(layer, "stride", 1)) or 1
        rows, columns = (strides, strides) if isinstance(strides, int) else strides
        seen = x[:, ::rows, ::columns]
        if seen.shape[:3] != y.shape[:3] or x.shape[-1] != kernel.shape[0]:
            raise InputError(
                f"{_WHAT}: layer {path!r} makes {y.shape} of {x.shape}, which a 1×1 convolution of "
                f"{kernel.shape[0]} channels and strides {rows, columns} doesn't; take parallel=False, or leave it out "
                f"by only"
            )
        return y + _by_points(seen, kernel).astype(y.dtype)

    return hook
