"""Augmentation of whole batches in NumPy.

A transform is a function `(batch, rng, rows=None) -> batch` on `{"image": [B, H, W, C], "label": ...}`.
`rows` says which rows of a larger, global batch the given ones are: random numbers are drawn for the global
batch and those of the rows are used, so that hosts with a part of it each make what one host would have made.
Such a transform carries `per_example = True`. Any other function `(batch, rng) -> batch` serves too: it gets
the global batch, on every host.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.errors import InputError


class Rows(NamedTuple):
    """Rows `start` to `stop` of a global batch of `total` examples."""

    start: int
    stop: int
    total: int


def _images(batch):
    if "image" not in batch:
        raise InputError(
            f"this transform changes images, batch['image'], and the batch has {', '.join(sorted(batch))}; leave it "
            "out, or write one: (batch, rng) -> batch"
        )
    return batch["image"]


def _draw(batch, rows, draw):
    """The part of `draw(total)` that belongs to the rows of the batch."""
    rows = rows or Rows(0, len(batch["image"]), len(batch["image"]))
    return draw(rows.total)[rows.start : rows.stop]


def _per_example(transform: Any, per_example: bool = True):
    transform.per_example = per_example
    return transform


def random_crop(padding: int = 4):
    """Pads images with zeros and cuts out the old size at a random place, each place equally likely.

    Args:
      padding: pixels on each side, at least 1.

    Returns:
      The transform.
    """
    if padding < 1:
        raise InputError(f"random_crop needs a padding of at least 1 pixel, got {padding}")

    @_per_example
    def transform(batch, rng, rows=None):
        image = _images(batch)
        places = _draw(batch, rows, lambda total: rng.integers(0, 2 * padding + 1, (total, 2))).tolist()
        size, height, width, channels = image.shape
        padded = np.zeros((size, height + 2 * padding, width + 2 * padding, channels), image.dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        cropped = np.empty(image.shape, image.dtype)
        for number, (y, x) in enumerate(places):
            cropped[number] = padded[number, y : y + height, x : x + width]
        return {**batch, "image": cropped}

    return transform


def random_flip():
    """Mirrors images left to right with probability one half.

    Returns:
      The transform.
    """

    @_per_example
    def transform(batch, rng, rows=None):
        image = _images(batch).copy()
        flip = _draw(batch, rows, lambda total: rng.random(total) < 0.5)
        image[flip] = image[flip][:, :, ::-1]
        return {**batch, "image": image}

    return transform


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

    @_per_example
    def transform(batch, rng, rows=None):
        image = _images(batch).copy()
        centres = _draw(batch, rows, lambda total: rng.integers(0, image.shape[1:3], (total, 2))).tolist()
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
    if alpha <= 0 or (classes is not None and classes < 1):
        raise InputError(f"mixup needs alpha > 0 and classes >= 1 or None, got {alpha} and {classes}")

    def transform(batch, rng):
        image = _as_float(_images(batch))
        weight = rng.beta(alpha, alpha, len(image)).astype(np.float32)
        other = rng.permutation(len(image))

        def mixed(values):
            w = weight.reshape(-1, *[1] * (values.ndim - 1))
            return w * values + (1 - w) * values[other]

        result = {**batch, "image": mixed(image)}
        label = result.pop("label", None)
        if classes is None or label is None:
            return result
        return {**result, "label": mixed(_one_hot(np.asarray(label), classes))}

    return transform


def _one_hot(label, classes):
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"mixup needs integer labels [B], got {label.dtype} {list(label.shape)}; mix once only")
    if label.size and not 0 <= label.min() <= label.max() < classes:
        raise InputError(f"mixup({classes=}) got labels from {label.min()} to {label.max()}; pass all classes")
    return np.eye(classes, dtype=np.float32)[label]


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

    @_per_example
    def transform(batch, rng, rows=None):
        image = _images(batch)
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

    return _per_example(transform, not whole)


def _as_float(image):
    return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
