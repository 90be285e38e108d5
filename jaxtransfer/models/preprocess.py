"""Models made from models: normalised inputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given


def normalize(model: Model, mean, std) -> Model:
    """Returns the model of (image − mean) / std, so that normalisation travels with the weights.

    Images of type uint8 are divided by 255 first; floating images are taken as lying in [0, 1] already.
    It computes in float32, or in float64 where the images have that type. The name and the stages stay;
    the result is another model (models compare by identity), so make it once.

    Args:
      model: the model of normalised images.
      mean: mean of the images in [0, 1], a number or one per channel [C].
      std: standard deviation likewise, positive.

    Raises:
      InputError: for another shape or a `std` that isn't positive; when called, for images of another type
        or number of channels.
    """
    mean, std = _statistic("mean", mean), _statistic("std", std)
    if not (std > 0).all():
        raise InputError(f"std must be positive; got {std.tolist()}")

    def prepare(images):
        images = _unit(images)
        return (images - _like(mean, images)) / _like(std, images)

    def init(key, inputs):
        return model.init(key, prepare(inputs))

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        return model.apply(variables, prepare(inputs), train=train, key=key, **given(axis=axis, still=still))

    recipe = model.recipe
    if recipe is not None and (recipe.mean is not None or recipe.heads):
        recipe = None  # normalised twice, or below the heads as well
    made = dataclasses.replace(model, init=init, apply=apply)
    return made.made_from(recipe, mean=mean.tolist(), std=std.tolist())


def _statistic(name, value):
    value = np.asarray(value, np.float64)
    if value.ndim > 1 or not np.isfinite(value).all():
        raise InputError(f"{name} must be a finite number or one per channel [C]; got {value.tolist()}")
    return value.reshape(-1)


def _unit(images):
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(jnp.promote_types(images.dtype, jnp.float32))
    raise InputError(f"expected images of type uint8 in [0, 255] or floating in [0, 1]; got {images.dtype}")


def _like(statistic, images):
    if images.ndim == 0 or statistic.size not in (1, images.shape[-1]):
        raise InputError(f"the mean and std have {statistic.size} channels; got images of shape {images.shape}")
    return jnp.asarray(statistic, images.dtype).reshape((1,) * (images.ndim - 1) + (-1,))
