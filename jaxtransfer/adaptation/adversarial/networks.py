"""The networks that adversarial methods bring along: a domain discriminator, and a second classifier.

Pure functions of features, for `ctx.run`; any other `jt.Model` of features with the output `logits` takes their place.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model

EPSILON, MOMENTUM = 1e-5, 0.9  # of batch norm


def discriminator(
    *, hidden: Sequence[int] = (1024, 1024), batch_norm: bool = True, name: str = "discriminator"
) -> Model:
    """Returns a perceptron of features [B, ...] with the output `logits` [B, 1], above 0 for the source.

    Linear layers, each followed by batch norm and ReLU, then a linear one, initialised as in PyTorch: the released
    discriminator of DANN and CDAN, less its sigmoid. Batch norm is what holds it together, as it keeps a discriminator
    from winning by the scale of features that grow; it needs the rows of both domains in one run, or the statistics of
    each domain would already give it away.

    Args:
      hidden: widths of the hidden layers.
      batch_norm: whether they are normalised.
      name: key of the weights.
    """
    return _perceptron(1, hidden, batch_norm, name)


def classifier(
    classes: int, *, hidden: Sequence[int] = (), batch_norm: bool = False, name: str = "classifier"
) -> Model:
    """Returns a classifier of features [B, ...] with the output `logits` [B, C]; without hidden layers it is linear.

    `hidden=(1024,)` is the released head of MDD, `hidden=(1024, 1024), batch_norm=True` that of MCD, less dropout.

    Args:
      classes: C.
      hidden: widths of the hidden layers, each followed by ReLU.
      batch_norm: whether they are normalised before it.
      name: key of the weights.

    Raises:
      InputError: for fewer than one class.
    """
    if classes < 1:
        raise InputError(f"a classifier tells one class or more apart; got {classes}")
    return _perceptron(classes, hidden, batch_norm, name)


def classifier_like(name: str) -> Model:
    """Returns a linear classifier whose `init` takes features and the logits whose number of classes it has."""

    def init(key, inputs):
        features, logits = inputs
        return classifier(logits.shape[-1], name=name).init(key, features)

    return Model(init, classifier(1).apply, name)


def _perceptron(outputs: int, hidden: Sequence[int], batch_norm: bool, name: str) -> Model:
    if any(width < 1 for width in hidden):
        raise InputError(f"hidden layers have one unit or more; got {tuple(hidden)}")
    layers = [f"hidden{number}" for number, _ in enumerate(hidden, 1)]

    def init(key, x):
        params: dict[str, Any] = {}
        stats: dict[str, Any] = {}
        size = x.size // max(len(x), 1)
        keys = jax.random.split(key, len(hidden) + 1)
        for layer, width, one in zip((*layers, "head"), (*hidden, outputs), keys, strict=True):
            params[layer] = _linear(one, size, width)
            if batch_norm and layer != "head":
                norm = layer.replace("hidden", "norm")
                params[norm] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
                stats[norm] = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
            size = width
        return {"params": params, **({"batch_stats": stats} if stats else {})}

    def apply(variables, x, *, train, key, axis=None):
        params, stats = variables["params"], dict(variables.get("batch_stats", {}))
        x = x.reshape(x.shape[0], -1)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for layer in layers:
            x = x @ params[layer]["kernel"] + params[layer]["bias"][None]
            norm = layer.replace("hidden", "norm")
            if norm in params:
                x, stats[norm] = _normalised(x, params[norm], stats[norm], train, axis)
            x = jax.nn.relu(x)
        logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
        return {"features": x, "logits": logits}, {"batch_stats": stats} if stats else {}

    return Model(
        init, apply, name, stages=(*(f"(hidden|norm){number}" for number in range(1, 1 + len(hidden))), "head")
    )


def _linear(key: jax.Array, size: int, width: int) -> dict[str, jax.Array]:
    """Weights and biases uniform within ±1/√size, as PyTorch's."""
    limit = max(size, 1) ** -0.5
    kernel, bias = (
        jax.random.uniform(one, shape, minval=-limit, maxval=limit)
        for one, shape in zip(jax.random.split(key), ((size, width), (width,)), strict=True)
    )
    return {"kernel": kernel, "bias": bias}


def _normalised(x: jax.Array, params: Any, stats: Any, train: bool, axis: str | None) -> tuple[jax.Array, Any]:
    """Batch norm over the rows of all devices; returns the rows and the new running statistics."""
    mean, var = stats["mean"], stats["var"]
    if train:
        mean = _mean(x, axis)
        var = _mean(jnp.square(x - mean[None]), axis)
        stats = {name: MOMENTUM * stats[name] + (1 - MOMENTUM) * new for name, new in (("mean", mean), ("var", var))}
    factor = jax.lax.rsqrt(var + EPSILON) * params["scale"]
    return (x - mean[None]) * factor[None] + params["bias"][None], stats


def _mean(x: jax.Array, axis: str | None) -> jax.Array:
    mean = jnp.mean(x, axis=0)
    return mean if axis is None else jax.lax.pmean(mean, axis)
