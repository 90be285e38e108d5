"""Stochastic normalisation: in training, channels that are drawn anew each time go by the moving statistics."""

import dataclasses
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given
from jaxtransfer.models.batch_norm import BatchNorm


def stoch_norm(model: Model, probability: float = 0.5) -> Model:
    """Returns the model with stochastic normalisation in the place of batch norm; its weights are the same.

    (Kou et al. 2020, NeurIPS: "Stochastic normalization"; their probability is 0.5.) In training each layer draws for
    each channel, once for the batch, whether the moving statistics normalise it (with this probability) or the batch's,
    so that the pretrained statistics go on being used and small batches are overfitted less. The moving ones are those
    before this batch, as in the authors' code; no gradient flows through them. They move, and inference runs, as with
    batch norm; frozen layers stay in inference mode.

        model = jt.models.stoch_norm(loaded.model)
        jt.fit(jt.classification(model), ..., params=loaded.params, state=loaded.state)

    All devices draw the same channels. Wrap a model last, around `with_heads` and not inside.

    Args:
      model: one of `jt.models`, whose batch norm is `jt.models.BatchNorm`.
      probability: that a channel is normalised by the moving statistics: 0 is batch norm.

    Raises:
      InputError: for a probability outside of [0, 1]; in training, for a model without such layers.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"probability must be in [0, 1]; got {probability}")

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        if not train:
            return model.apply(variables, inputs, train=False, key=key, **given(axis=axis, still=still))
        if key is None:
            raise InputError(f"model {model.name!r} draws (stoch_norm) when training: pass a key; got key=None")
        own = key if axis is None or model.shares_key else jax.random.fold_in(key, jax.lax.axis_index(axis))
        layers = _Layers(key, probability)
        with nn.intercept_methods(layers.intercept):
            outputs = model.apply(variables, inputs, train=True, key=own, **given(axis=axis, still=still))
        if not layers.met:
            raise InputError(
                f"stoch_norm found no batch norm of jt.models in model {model.name!r}; take a model that has it, a "
                f"ResNet say"
            )
        return outputs

    return dataclasses.replace(model, apply=apply, shares_key=True).made_from(model.recipe)


class _Layers:
    """Intercepts the batch norm layers of one forward pass in training."""

    def __init__(self, key: jax.Array, probability: float):
        self.key, self.probability, self.met = key, probability, False

    def intercept(self, call, args, kwargs, context) -> Any:
        layer = context.module
        if not isinstance(layer, BatchNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        self.met = True
        if not layer.train:
            return call(*args, **kwargs)
        moving = jax.lax.stop_gradient({name: layer.get_variable("batch_stats", name) for name in ("mean", "var")})
        by_batch = call(*args, **kwargs)  # which moves them
        (x,) = args
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (layer.get_variable("params", name) for name in ("scale", "bias"))
        factor = jax.lax.rsqrt(moving["var"] + layer.epsilon) * scale
        by_moving = (x - moving["mean"].reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)
        key = jax.random.fold_in(self.key, zlib.crc32("/".join(layer.path).encode()))
        drawn = jax.random.bernoulli(key, self.probability, (x.shape[-1],))
        return jnp.where(drawn.reshape(shape), by_moving.astype(by_batch.dtype), by_batch)
