"""Rectangles of images erased."""

from collections.abc import Sequence

import numpy as np

from jaxtransfer.data.transform import draw_for, images_of, per_example, span
from jaxtransfer.errors import InputError

_TRIES = 10


def random_erasing(
    probability: float = 0.25,
    *,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    value: float | Sequence[float] | None = None,
):
    """Fills a rectangle at a random place of some images (Zhong et al. 2020, arXiv:1708.04896).

    Its area is uniform in `scale` of the image's, its height over its width log-uniform in `ratio`; of ten draws the
    first one that fits is taken, and without one the image stays, as in torchvision.

    Args:
      probability: of an image to be changed, in [0, 1].
      scale: range of shares of the area, in (0, 1].
      ratio: range of height over width.
      value: what fills it, for all channels or for each, in the units of the images: whole numbers in 0..255 for
        bytes. None draws every value anew (uniform in 0..255, or in [0, 1) for floats), which the paper found best.

    Returns:
      The transform.
    """
    if not 0 <= probability <= 1:
        raise InputError(f"random_erasing needs a probability in [0, 1], got {probability}")
    low, high = span("scale", scale, 0, 1)
    narrow, wide = np.log(span("ratio", ratio, 0))
    filled = None if value is None else _filling(value)

    @per_example
    def transform(batch, rng, rows=None):
        image = images_of(batch).copy()
        if filled is not None:
            _check_fits(filled, image)
        height, width = image.shape[1:3]
        drawn = draw_for(batch, rows, lambda total: rng.random((total, 1 + 4 * _TRIES)))
        seeds = draw_for(batch, rows, lambda total: rng.integers(2**63, size=total))
        area, shape, top, left = np.moveaxis(drawn[:, 1:].reshape(-1, _TRIES, 4), -1, 0)
        area, shape = height * width * (low + (high - low) * area), np.exp(narrow + (wide - narrow) * shape)
        tall, broad = (np.round(np.sqrt(side)).astype(int) for side in (area * shape, area / shape))
        fits = (tall < height) & (broad < width) & (tall > 0) & (broad > 0)
        for row in np.flatnonzero((drawn[:, 0] < probability) & fits.any(axis=1)):
            chosen = int(np.argmax(fits[row]))
            h, w = int(tall[row, chosen]), int(broad[row, chosen])
            y, x = int(top[row, chosen] * (height - h + 1)), int(left[row, chosen] * (width - w + 1))
            place = image[row, y : y + h, x : x + w]
            place[...] = _noise(int(seeds[row]), place) if filled is None else filled
        return {**batch, "image": image}

    return transform


def _noise(seed: int, like: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, like.shape, np.uint8) if like.dtype == np.uint8 else rng.random(like.shape)


def _filling(value: float | Sequence[float]) -> np.ndarray:
    try:
        filled = np.asarray(value, float)
    except (TypeError, ValueError):
        filled = np.array(np.nan)
    if filled.ndim > 1 or not np.isfinite(filled).all():
        raise InputError(f"random_erasing fills with a finite number, or one for each channel; got {value!r}")
    return filled


def _check_fits(filled: np.ndarray, image: np.ndarray) -> None:
    """Raises for another number of channels, and for shares of 1 where images are bytes: they would become 0."""
    if filled.ndim and len(filled) not in (1, image.shape[-1]):
        raise InputError(f"random_erasing fills {len(filled)} channels; the images have {image.shape[-1]}")
    if image.dtype == np.uint8 and not ((filled >= 0) & (filled <= 255) & (filled == np.round(filled))).all():
        raise InputError(
            f"random_erasing fills images of bytes with whole numbers in 0..255; got {filled.tolist()}. Name it behind "
            f"what makes floats, or multiply by 255"
        )
