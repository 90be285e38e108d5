"""Augmentation of whole batches in NumPy.

A transform is a function `(batch, rng, rows=None) -> batch` on `{"image": [B, H, W, C], "label": ...}`.
`rows` says which rows of a larger, global batch the given ones are: random numbers are drawn for the global
batch and those of the rows are used, so that hosts with a part of it each make what one host would have made.
Such a transform carries `per_example = True`. Any other function `(batch, rng) -> batch` serves too: it gets
the global batch, on every host.
"""

import math

import numpy as np

from jaxtransfer.data.color import color_jitter as color_jitter
from jaxtransfer.data.cutmix import cutmix as cutmix
from jaxtransfer.data.cutmix import one_hot
from jaxtransfer.data.erasing import random_erasing as random_erasing
from jaxtransfer.data.rand_augment import rand_augment as rand_augment
from jaxtransfer.data.resized_crop import random_resized_crop as random_resized_crop
from jaxtransfer.data.transform import Rows as Rows
from jaxtransfer.data.transform import draw_for, images_of, per_example
from jaxtransfer.errors import InputError


def random_crop(padding: int = 4):
    """Pads images with zeros and cuts out the old size at a random place, each place equally likely.

    Args:
      padding: pixels on each side, at least 1.

    Returns:
      The transform.
    """
    if padding < 1:
        raise InputError(f"random_crop needs a padding of at least 1 pixel, got {padding}")

    @per_example
    def transform(batch, rng, rows=None):
        image = images_of(batch)
        top, left = draw_for(batch, rows, lambda total: rng.integers(0, 2 * padding + 1, (total, 2))).T
        size, height, width, channels = image.shape
        padded = np.zeros((size, height + 2 * padding, width + 2 * padding, channels), image.dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        lines = padded.reshape(*padded.shape[:2], padded.shape[2] * channels)  # copied as they lie
        each, down, along = lines.strides
        cuts = np.lib.stride_tricks.as_strided(
            lines,
            (size, 2 * padding + 1, 2 * padding + 1, height, width * channels),
            (each, down, along * channels, down, along),
            writeable=False,
        )
        return {**batch, "image": cuts[np.arange(size), top, left].reshape(image.shape)}

    return transform


def random_flip():
    """Mirrors images left to right with probability one half.

    Returns:
      The transform.
    """

    @per_example
    def transform(batch, rng, rows=None):
        image = images_of(batch).copy()
        flip = draw_for(batch, rows, lambda total: rng.random(total) < 0.5)
        image[flip] = _mirrored(image[flip])
        return {**batch, "image": image}

    return transform


def _mirrored(image):
    """Returns images [B, H, W, C] left to right: by OpenCV, ten times as fast, where it knows their type."""
    if image.dtype not in (np.uint8, np.float32) or image.shape[-1] > 4 or image.size == 0:
        return image[:, :, ::-1]
    import cv2

    return cv2.flip(image.reshape(-1, *image.shape[2:]), 1).reshape(image.shape)


def cutout(size: int):
    """Sets a square at a random place to zero (DeVries and Taylor 2017, arXiv:1708.04552).

    The centre is any pixel, so a square may lie partly outside of the image.

    Args:
      size: side of the square in pixels, at least 1.

    Returns:
      The transform.
    """
    if size < 1:
        raise InputError(f"cutout needs a size of at least 1 pixel, got {size}")

    @per_example
    def transform(batch, rng, rows=None):
        image = images_of(batch).copy()
        centres = draw_for(batch, rows, lambda total: rng.integers(0, image.shape[1:3], (total, 2))).tolist()
        for number, (y, x) in enumerate(centres):
            top, left = y - size // 2, x - size // 2
            image[number, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        return {**batch, "image": image}

    return transform


def mixup(alpha: float, classes: int | None = None):
    """Mixes each example with another one of the batch (Zhang et al. 2018, arXiv:1710.09412).

    lambda x_i + (1 - lambda) x_j and the same of the one-hot labels; j is a permutation of the global batch,
    lambda ~ Beta(alpha, alpha) for each example. uint8 images are divided by 255 first.

    Args:
      alpha: positive; small values leave most examples almost alone.
      classes: number of classes C. None drops the labels, for what learns from images alone: matching a teacher as a
        function, on mixed images (Beyer et al. 2022, arXiv:2106.05237).

    Returns:
      The transform; it gives `image` float32 and, with `classes`, `label` float32 [B, C], and needs the global batch.
    """
    if not 0 < alpha < np.inf or (classes is not None and classes < 1):
        raise InputError(f"mixup needs a finite alpha > 0 and classes >= 1 or None, got {alpha} and {classes}")

    def transform(batch, rng):
        image = _as_float(images_of(batch))
        weight = rng.beta(alpha, alpha, len(image)).astype(np.float32)
        other = rng.permutation(len(image))

        def mixed(values):
            w = weight.reshape(-1, *[1] * (values.ndim - 1))
            return w * values + (1 - w) * values[other]

        result = {**batch, "image": mixed(image)}
        label = result.pop("label", None)
        if classes is None or label is None:
            return result
        return {**result, "label": mixed(one_hot(label, classes, "mixup"))}

    return transform


def normalize(mean, std):
    """Subtracts the mean and divides by the standard deviation of each channel.

    Args:
      mean: per channel, or one number, in units of images in [0, 1].
      std: the same, positive.

    Returns:
      The transform; it gives float32 images. uint8 images are divided by 255 first, floats are taken as they
      are.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if mean.ndim > 1 or std.ndim > 1 or not (std > 0).all():
        raise InputError(f"normalize needs a mean and a positive std per channel, got {mean} and {std}")

    @per_example
    def transform(batch, rng, rows=None):
        image = images_of(batch)
        for value in (mean, std):
            if value.size not in (1, image.shape[-1]):
                raise InputError(f"normalize has {value.size} channels, the images have {image.shape[-1]}")
        scale = np.float32(1 / 255) if image.dtype == np.uint8 else np.float32(1)
        # A factor per (column, channel): a short last axis would be slow.
        factor = np.broadcast_to(scale / std, image.shape[2:]).ravel()
        shift = np.broadcast_to(mean / std, image.shape[2:]).ravel()
        flat = np.multiply(image.reshape(*image.shape[:2], -1), factor, dtype=np.float32)
        flat -= shift
        return {**batch, "image": flat.reshape(image.shape)}

    return transform


def compose(*transforms):
    """Applies transforms one after the other with one stream of random numbers.

    Args:
      *transforms: transforms of this module or `(batch, rng) -> batch`.

    Returns:
      The transform.
    """
    whole = not all(getattr(transform, "per_example", False) for transform in transforms)

    def transform(batch, rng, rows=None):
        for step in transforms:
            batch = step(batch, rng) if whole else step(batch, rng, rows)
        return batch

    chooses = math.prod(getattr(step, "chooses", 1) for step in transforms)
    return _reading(transforms, _choosing(chooses, per_example(transform, not whole)))


def one_of(*transforms):
    """Applies one of several transforms to each batch, each as often: mixup or cutmix, say, as timm does by default.

    Args:
      *transforms: transforms of this module or `(batch, rng) -> batch`.

    Returns:
      The transform.
    """
    if not transforms:
        raise InputError("one_of needs one transform or more")
    whole = not all(getattr(transform, "per_example", False) for transform in transforms)

    def transform(batch, rng, rows=None):
        step = transforms[int(rng.integers(len(transforms)))]
        return step(batch, rng) if whole else step(batch, rng, rows)

    return _choosing(len(transforms), per_example(transform, not whole))


def _choosing(count, transform):
    """Notes among how many each batch gets one, for the fingerprint, which is to see all of them."""
    transform.chooses = count
    return transform


def _reading(transforms, transform):
    """Marks a chain whose first transform takes images of any sizes as one that does."""
    transform.any_size = bool(transforms) and getattr(transforms[0], "any_size", False)
    return transform


def _as_float(image):
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
