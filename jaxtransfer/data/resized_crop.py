"""Random parts of images, brought to one size."""

import numpy as np

from jaxtransfer.data.transform import draw_for, images_of, per_example, span
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.resizing import AREA, INTERPOLATIONS, resized

_TRIES = 10


def random_resized_crop(
    size: int | tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
):
    """Cuts out a part of each image at a random place and resizes it (Szegedy et al. 2015, arXiv:1409.4842).

    Its area is uniform in `scale` of the image's, its width over its height log-uniform in `ratio`; of ten draws the
    first one that fits is taken, else the largest middle part of an aspect ratio in `ratio`. That is torchvision's
    `RandomResizedCrop`, and with "bilinear" and "bicubic", Pillow's filters, its pixels too.

    As the first transform of a pipeline it cuts from images as their files have them, whatever their sizes; a data set
    that is already decoded gives those that it holds. Files are decoded at full size: a decoder that shrinks as it
    reads is faster and gives other pixels.

    Args:
      size: height and width of the result, or (H, W).
      scale: range of shares of the area, in (0, 1].
      ratio: range of width over height.
      interpolation: "bilinear", "bicubic" or "area".

    Returns:
      The transform; it gives `image` uint8 [B, H, W, C].
    """
    sides = (size, size) if isinstance(size, int | np.integer) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"random_resized_crop needs a size of at least 1 pixel, or (height, width), got {size!r}")
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", str(interpolation), INTERPOLATIONS)
    low, high = span("scale", scale, 0, 1)
    narrow, wide = span("ratio", ratio, 0)

    def places(shapes, drawn):
        """(top, left, height, width) of the part of each image, by (h, w) [B, 2] and draws [B, tries, 4]."""
        height, width = (shapes[:, k, None] for k in (0, 1))
        area = height * width * (low + (high - low) * drawn[..., 0])
        shape = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * drawn[..., 1])
        broad, tall = (np.round(np.sqrt(side)).astype(int) for side in (area * shape, area / shape))
        fits = (broad > 0) & (broad <= width) & (tall > 0) & (tall <= height)
        top, left = (drawn[..., 2] * (height - tall + 1)).astype(int), (drawn[..., 3] * (width - broad + 1)).astype(int)
        chosen = np.argmax(fits, axis=1)
        rows = np.arange(len(shapes))
        found = np.stack([part[rows, chosen] for part in (top, left, tall, broad)], axis=1)
        for row in np.flatnonzero(~fits.any(axis=1)):
            found[row] = _middle(int(shapes[row, 0]), int(shapes[row, 1]), narrow, wide)
        return found.tolist()

    @per_example
    def transform(batch, rng, rows=None):
        image = images_of(batch)
        if interpolation != AREA and any(
            one.dtype != np.uint8 for one in (image if isinstance(image, list) else [image])
        ):
            raise InputError("random_resized_crop resizes images uint8, got floats; put it before what makes them")
        drawn = draw_for(batch, rows, lambda total: rng.random((total, _TRIES, 4)))
        shapes = np.array([one.shape[:2] for one in image])
        parts = [
            resized(one[top : top + height, left : left + width], (int(sides[0]), int(sides[1])), interpolation)
            for one, (top, left, height, width) in zip(image, places(shapes, drawn), strict=True)
        ]
        return {**batch, "image": np.stack(parts)}

    transform.any_size = True
    return transform


def _middle(height: int, width: int, narrow: float, wide: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest middle part whose aspect ratio is in the range."""
    tall, broad = height, width
    if width / height < narrow:
        tall = min(height, round(width / narrow))
    elif width / height > wide:
        broad = min(width, round(height * wide))
    return (height - tall) // 2, (width - broad) // 2, tall, broad
