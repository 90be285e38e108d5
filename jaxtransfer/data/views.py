"""Augmentation on the device: random views of images inside of the compiled step, keyed by example.

A transform is a function `(key, image) -> image` of one image, float [H, W, C] in [0, 1]. `chain` joins several;
`two_views`, `many_views` and `augmented` apply them to whole batches, for `transform=` of `jt.fit` and
`jt.train_step`. Example i of a batch draws from its own key, so its views don't depend on the others, nor on how many
devices share the batch.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.data.warps import affine as affine
from jaxtransfer.data.warps import cutout as cutout
from jaxtransfer.errors import InputError

Transform = Callable[[jax.Array, jax.Array], jax.Array]

_GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as torchvision has it
_YIQ = np.array([_GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])


def chain(*transforms: Transform) -> Transform:
    """Returns the transforms one after the other, each with a key of its own."""

    def transform(key, image):
        for number, step in enumerate(transforms):
            image = step(jax.random.fold_in(key, number), image)
        return image

    return transform


def sometimes(probability: float, transform: Transform) -> Transform:
    """Returns the transform applied with a probability, else the image as it is."""
    if not 0 <= probability <= 1:
        raise InputError(f"a probability is in [0, 1]; got {probability}")

    def either(key, image):
        choose, draw = jax.random.split(key)
        return jnp.where(jax.random.uniform(choose) < probability, transform(draw, image), image)

    return either


def random_resized_crop(
    size: int | None = None, *, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Transform:
    """Cuts out a part at random and brings it to a size (Szegedy et al. 2015), by bilinear interpolation.

    The area is uniform in `scale`, the logarithm of width / height in that of `ratio`; a part that would stick out is
    cut at the sides of the image.

    Args:
      size: side of the result in pixels; that of the image by default.
      scale: smallest and largest share of the area.
      ratio: smallest and largest width / height.
    """
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise InputError(f"expected 0 < scale <= 1 and 0 < ratio, each (least, most); got {scale} and {ratio}")

    def transform(key, image):
        height, width, channels = image.shape
        area, shape, place = jax.random.split(key, 3)
        share = jax.random.uniform(area, minval=scale[0], maxval=scale[1])
        side = jnp.exp(0.5 * jax.random.uniform(shape, minval=math.log(ratio[0]), maxval=math.log(ratio[1])))
        extent = jnp.minimum(jnp.sqrt(share * height * width) * jnp.stack([1 / side, side]), jnp.array([height, width]))
        start = jax.random.uniform(place, (2,)) * (jnp.array([height, width]) - extent)
        out = (size or height, size or width)
        factor = jnp.array(out) / extent
        return jax.image.scale_and_translate(
            image, (*out, channels), (0, 1), factor, -start * factor, "linear", antialias=True
        ).clip(0, 1)

    return transform


def random_crop(padding: int = 4) -> Transform:
    """Pads with zeros and cuts out the old size at a random place."""
    if padding < 1:
        raise InputError(f"random_crop needs a padding of at least 1 pixel, got {padding}")

    def transform(key, image):
        start = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        return jax.lax.dynamic_slice(padded, (start[0], start[1], 0), image.shape)

    return transform


def random_flip() -> Transform:
    """Mirrors left to right with probability one half."""
    return sometimes(0.5, lambda key, image: image[:, ::-1])


def color_jitter(
    brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1
) -> Transform:
    """Changes brightness, contrast, saturation and hue by random factors, in a random order.

    Factors are uniform in [max(0, 1 − s), 1 + s], the hue turns by up to ± `hue` of the circle, about the grey axis of
    the colours (YIQ). SimCLR (Chen et al. 2020) has s = 0.8 · strength and hue = 0.2 · strength. Grey images keep
    brightness and contrast only.
    """
    if not all(0 <= strength < jnp.inf for strength in (brightness, contrast, saturation, hue)) or hue > 0.5:
        raise InputError(
            f"expected strengths of at least 0, hue at most 0.5; got {(brightness, contrast, saturation, hue)}"
        )

    def factor(key, strength):
        return jax.random.uniform(key, minval=max(0.0, 1 - strength), maxval=1 + strength)

    def transform(key, image):
        keys = jax.random.split(key, 5)
        size = image.shape[-1]
        same = jnp.eye(size)
        matrices = [factor(keys[0], brightness) * same, factor(keys[1], contrast) * same]
        if size == 3:  # every step is a matrix on the colours; contrast adds a part of the mean brightness
            share = factor(keys[2], saturation)
            matrices.append(share * same + (1 - share) * jnp.broadcast_to(jnp.array(_GREY)[None], (3, 3)))
            matrices.append(_turned(jax.random.uniform(keys[3], minval=-hue, maxval=hue)))
        mean_share = jnp.zeros(len(matrices)).at[1].set(1 - matrices[1][0, 0])
        for step in jax.random.permutation(keys[4], len(matrices)):
            matrix = jnp.stack(matrices)[step].astype(image.dtype)
            shift = (mean_share[step] * jnp.mean(_grey(image))).astype(image.dtype)
            image = (jnp.einsum("hwc,dc->hwd", image, matrix) + shift).clip(0, 1)
        return image

    return transform


def greyscale() -> Transform:
    """Takes the colours away; the number of channels stays."""
    return lambda key, image: jnp.broadcast_to(_grey(image), image.shape)


def solarize(threshold: float = 0.5) -> Transform:
    """Inverts what is brighter than a threshold."""
    return lambda key, image: jnp.where(image >= threshold, 1 - image, image)


def gaussian_blur(sigma: tuple[float, float] = (0.1, 2.0)) -> Transform:
    """Blurs by a Gaussian whose standard deviation in pixels is uniform in `sigma`; the image goes on at its rim."""
    if not 0 < sigma[0] <= sigma[1]:
        raise InputError(f"expected 0 < sigma, (least, most); got {sigma}")

    def transform(key, image):
        width = jax.random.uniform(key, minval=sigma[0], maxval=sigma[1])
        rows, columns = (_smoothing(side, width).astype(image.dtype) for side in image.shape[:2])
        return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns)

    return transform


def simclr(
    size: int | None = None,
    *,
    strength: float = 0.5,
    blur: bool = False,
    flip: bool = True,
    area: tuple[float, float] = (0.08, 1.0),
) -> Transform:
    """Returns SimCLR's augmentation (Chen et al. 2020, arXiv:2002.05709, appendix A): crop, flip, colours, grey, blur.

    Args:
      size: side of the views; that of the images by default.
      strength: of the colours; 1 for ImageNet, 0.5 for CIFAR, 0 for colours as they are.
      blur: whether half of the views are blurred; CIFAR's are not.
      flip: whether half of them are mirrored.
      area: the smallest and the largest share of the image that is cut out.
    """
    s = strength
    steps = [random_resized_crop(size, scale=area)]
    if flip:
        steps.append(random_flip())
    if strength:
        steps += [sometimes(0.8, color_jitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)), sometimes(0.2, greyscale())]
    return chain(*steps, *([sometimes(0.5, gaussian_blur())] if blur else []))


def augmented(transform: Transform, *, view: str = "image") -> Callable[[jax.Array, Any, Any], dict[str, Any]]:
    """Returns the batch transform that replaces each image by one view of it."""
    return many_views({view: transform}, of=view)


def two_views(
    transform: Transform, other: Transform | None = None, *, of: str = "image"
) -> Callable[[jax.Array, Any, Any], dict[str, Any]]:
    """Returns the batch transform to two views of each image, `image` and `image2`.

    Args:
      transform: of the first view.
      other: of the second; the same, drawn anew, by default.
      of: the entry of the images.
    """
    return many_views({"image": transform, "image2": other or transform}, of=of)


def many_views(views: dict[str, Transform], *, of: str = "image") -> Callable[[jax.Array, Any, Any], dict[str, Any]]:
    """Returns the batch transform to several views of each image, such as DINO's large and small crops.

    Args:
      views: by the entry that each makes: its transform.
      of: the entry of the images, uint8 or float in [0, 1]; the result is float32, or of the images' float type.

    Returns:
      `transform(key, batch, rows) -> batch`, `rows` [B] the numbers of the examples in the global batch.
    """

    def transform(key, batch, rows):
        if of not in batch:
            raise InputError(f"expected images in batch[{of!r}]; the batch has {', '.join(sorted(batch))}")
        images = batch[of]
        if images.ndim != 4:
            raise InputError(f"expected images [B, H, W, C] in batch[{of!r}]; got shape {images.shape}")
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"expected images of type uint8, or floating in [0, 1], in batch[{of!r}]; got {images.dtype}"
            )
        images = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
        made = {
            name: jax.vmap(lambda k, x, n=number, t=view: t(jax.random.fold_in(k, n), x))(keys, images)
            for number, (name, view) in enumerate(views.items())
        }
        return {**batch, **made}

    return transform


def on(key: str, transform: Callable[[jax.Array, Any, Any], Any]) -> Callable[[jax.Array, Any, Any], dict[str, Any]]:
    """Returns the batch transform that changes a part of zipped batches alone: `on("target", two_views(...))`.

    The rows of a part count from 0 within it, whatever the sizes of the others; parts draw apart from each other.

    Args:
      key: of the part.
      transform: of its batches, such as `augmented`, `two_views` and `many_views` give.
    """

    def changed(draw, batch, rows):
        if key not in batch or not isinstance(batch[key], Mapping):
            raise InputError(f"expected a part {key!r} in zipped batches; the batch has {', '.join(sorted(batch))}")
        size = jax.tree.leaves(batch[key])[0].shape[0]
        device = rows[0] // rows.shape[0]  # each holds as many rows of a part as the others
        own = device * size + jnp.arange(size)
        part = transform(jax.random.fold_in(draw, zlib.crc32(key.encode())), batch[key], own)
        return {**batch, key: part}

    return changed


def in_turn(*transforms: Callable[[jax.Array, Any, Any], Any]) -> Callable[[jax.Array, Any, Any], Any]:
    """Returns batch transforms one after the other, each with a key of its own: `in_turn(on("a", f), on("b", g))`."""

    def changed(key, batch, rows):
        for number, transform in enumerate(transforms):
            batch = transform(jax.random.fold_in(key, number), batch, rows)
        return batch

    return changed


def _grey(image: jax.Array) -> jax.Array:
    """Returns the brightness [H, W, 1]."""
    if image.shape[-1] != 3:
        return jnp.mean(image, axis=-1, keepdims=True)
    return (image @ jnp.array(_GREY, image.dtype))[..., None]


def _turned(turn: jax.Array) -> jax.Array:
    """Returns the matrix [3, 3] that turns colours about the grey axis by a share of the circle, in the YIQ space."""
    c, s = jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    rotation = jnp.zeros((3, 3)).at[0, 0].set(1).at[1:, 1:].set(jnp.array([[c, -s], [s, c]]))
    return jnp.asarray(np.linalg.inv(_YIQ), jnp.float32) @ rotation @ jnp.asarray(_YIQ, jnp.float32)


def _smoothing(side: int, width: jax.Array) -> jax.Array:
    """Returns the matrix [side, side] of a Gaussian average along one side, its weights beyond the rim on the rim."""
    places = jnp.arange(-side, 2 * side)
    weights = jnp.exp(-0.5 * jnp.square((places[None] - jnp.arange(side)[:, None]) / width))
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    inside = weights[:, side : 2 * side]
    inside = inside.at[:, 0].add(jnp.sum(weights[:, :side], axis=1))
    return inside.at[:, -1].add(jnp.sum(weights[:, 2 * side :], axis=1))
