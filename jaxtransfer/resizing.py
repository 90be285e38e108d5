"""How images of any size become images of one: stretched, or resized as they are and cut in the middle."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.errors import InputError, unknown

AREA = "area"
INTERPOLATIONS = (AREA, "bilinear", "bicubic")
"""What pixels are made by: the mean over areas, or one of Pillow's filters."""
MOST_PIXELS = 2**26
"""Of an image resized with its aspect ratio, 64 million; of a longer strip only what lies around its middle is."""


class Plan(NamedTuple):
    """What becomes of an image: it is brought to `rows` x `columns`, and what begins at (`top`, `left`) is cut out."""

    rows: int
    columns: int
    top: int
    left: int


@dataclass(frozen=True)
class Resizing:
    """How an image [h, w, C] becomes one of (H, W).

    With a share it keeps its aspect ratio: it is resized until it covers floor(H / crop) x floor(W / crop), its shorter
    side exactly, and the middle H x W is cut out. That is torchvision's `Resize(floor(H / crop))` and `CenterCrop(H)`,
    and timm's evaluation with `crop_pct=crop`.

    The filters "bilinear" and "bicubic" are Pillow's own, which widen as an image shrinks: equal, byte by byte, to
    what torchvision and timm make of a PIL image. "area" is OpenCV's: the mean over the area of each pixel where an
    image shrinks, and bilinear where it grows.

    Attributes:
      crop: share of the resized image that stays, in (0, 1]; None stretches the image, whatever its aspect ratio.
      interpolation: one of `INTERPOLATIONS`.
    """

    crop: float | None = 0.875
    interpolation: str = "bilinear"

    def __post_init__(self):
        crop = self.crop
        if crop is not None and not (isinstance(crop, int | float) and 0 < crop <= 1):
            raise InputError(f"crop is the share of a resized image that stays, in (0, 1], or None; got {crop!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", str(self.interpolation), INTERPOLATIONS)

    def plan(self, old: tuple[int, int], size: tuple[int, int]) -> Plan:
        """Returns what becomes of an image of (h, w) = `old` that is to be one of (H, W) = `size`."""
        if self.crop is None:
            return Plan(*size, 0, 0)
        wanted = [math.floor(side / self.crop) for side in size]
        # whole numbers, so that no rounding decides: the side that must grow most comes out exactly
        decides = 0 if wanted[0] * old[1] >= wanted[1] * old[0] else 1
        rows, columns = (max(wanted[k], wanted[decides] * old[k] // old[decides]) for k in (0, 1))
        return Plan(rows, columns, *(round((new - kept) / 2) for new, kept in zip((rows, columns), size, strict=True)))

    def __call__(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Returns the image, uint8 [h, w, C], as one of [H, W, C]."""
        plan = self.plan((image.shape[0], image.shape[1]), size)
        if plan.rows * plan.columns > MOST_PIXELS:
            return _middle(image, plan, size, self.interpolation)
        image = resized(image, plan[:2], self.interpolation)
        return image[plan.top : plan.top + size[0], plan.left : plan.left + size[1]]

    def as_entries(self) -> dict[str, Any]:
        """Returns it as plain data, for a configuration."""
        return asdict(self)

    def __str__(self):
        how = "stretched" if self.crop is None else f"crop {self.crop:g}"
        return f"{how}, {self.interpolation}"


def _middle(image: np.ndarray, plan: Plan, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Returns the middle of a strip without the rest of it: the same to within rounding, of areas to within a pixel.

    The cubic filter overshoots, which is cut off to 0..255 between its two passes; Pillow may take them in another
    order then. One of 1 x 20,000 pixels would become 256 x 5 million, for 224 x 224 in its middle.
    """
    (top, bottom), (left, right) = (
        (first * old / new, (first + kept) * old / new)
        for new, first, old, kept in zip(plan[:2], plan[2:], image.shape[:2], size, strict=True)
    )
    if interpolation == AREA:
        interpolation = "box" if bottom - top > size[0] else "bilinear"
    return _by_pillow(image, size, interpolation, (left, top, right, bottom))


STRETCH = Resizing(None, AREA)
"""What images become where nothing else is said: stretched to the shape that is wanted."""


def from_entries(entries: Mapping[str, Any]) -> Resizing:
    """Returns the resizing that a configuration notes under `crop` and `interpolation`; it may note more.

    Raises:
      InputError: for what is none.
    """
    return Resizing(entries.get("crop"), entries.get("interpolation", "bilinear"))


def resized(image: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Returns an image, uint8 [h, w, C] with C of 1, 3 or 4, stretched to [H, W, C].

    Args:
      image: the image; with four channels the last one is its alpha, by which the filters weigh the colours.
      size: (H, W).
      interpolation: one of `INTERPOLATIONS`.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    if interpolation == AREA:
        import cv2

        shrinks = height < image.shape[0] or width < image.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method).reshape(height, width, -1)
    return _by_pillow(image, size, interpolation)


def _by_pillow(image: np.ndarray, size: tuple[int, int], name: str, box: Any = None) -> np.ndarray:
    from PIL import Image

    method = getattr(Image.Resampling, name.upper())
    whole = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))
    return np.asarray(whole.resize((size[1], size[0]), method, box)).reshape(*size, -1)


def fit(image: np.ndarray, image_shape: tuple[int, int, int], resizing: Resizing = STRETCH) -> np.ndarray:
    """Resizes and converts an image to `image_shape`.

    Grey to RGB repeats the channel; RGB to grey takes the luma (0.299, 0.587, 0.114); an alpha channel is dropped, or
    where one is wanted added as 255.

    Args:
      image: uint8 [h, w, c] with c of 1, 3 or 4.
      image_shape: the wanted (H, W, C), C of 1, 3 or 4.
      resizing: how; by default stretched, averaging over pixel areas where it shrinks, bilinear where it grows.

    Returns:
      uint8 [H, W, C].
    """
    height, width, channels = image_shape
    return _more_channels(resizing(_fewer_channels(image, channels), (height, width)), channels)


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Converts an image [h, w, c] to another number of channels, as `fit` does, and leaves its size."""
    return _more_channels(_fewer_channels(image, channels), channels)


def _fewer_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == 4 and channels != 4:
        image = image[:, :, :3]
    if image.shape[2] == 3 and channels == 1:
        import cv2

        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[:, :, None]
    return image


def _more_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == 1 and channels != 1:
        image = np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and channels == 4:
        image = np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], axis=2)
    return image


def fit_mask(mask: np.ndarray, shape: tuple[int, ...], resizing: Resizing = STRETCH) -> np.ndarray:
    """Resizes values of pixels that are no colours, such as classes, as `fit` does images: each pixel gets the value in
    the middle of what it covers.

    Args:
      mask: [h, w, ...].
      shape: the wanted (H, W, ...).
      resizing: how, as for the image.

    Returns:
      [H, W, ...], of the values that the mask has.
    """
    plan = resizing.plan((mask.shape[0], mask.shape[1]), (shape[0], shape[1]))
    rows, columns = (
        np.minimum((np.arange(first, first + kept) + 0.5) * old / new, old - 1).astype(np.int64)
        for first, kept, new, old in zip(plan[2:], shape[:2], plan[:2], mask.shape[:2], strict=True)
    )
    return mask[rows[:, None], columns]
