"""Changes of pixels for stacks of images, uint8 [n, H, W, C] with C of 1 or 3: Pillow's, with its roundings.

A factor is a number for each image, [n]; 1 leaves an image, 0 gives what it is blended with.
"""

import functools
from typing import Any

import numpy as np

Matrix = tuple[float, float, float, float, float, float]


def grey(stack: np.ndarray) -> np.ndarray:
    """Returns the luma [n, H, W, 1], as Pillow's mode L."""
    if stack.shape[-1] == 1:
        return stack
    weighed = stack.astype(np.float32) @ np.array([19595, 38470, 7471], np.float32)  # below 2^24: exact
    return ((weighed + 0x8000).astype(np.uint32) >> 16).astype(np.uint8)[..., None]


def blend(other: np.ndarray, stack: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Returns other + factor (stack - other), cut to whole numbers in 0..255 as `Image.blend` does."""
    alpha = np.asarray(factor, np.float32).reshape(-1, 1, 1, 1)
    other = other.astype(np.float32)
    mixed = stack.astype(np.float32)
    mixed -= other
    mixed *= alpha
    mixed += other
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def mapped(stack: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Returns each value v of image i and channel c as tables[i, v, c], uint8 [n or 1, 256, C or 1]."""
    import cv2

    if tables.size == 256:
        return cv2.LUT(stack.reshape(1, -1), tables.reshape(1, 256)).reshape(stack.shape)
    found = np.empty_like(stack)
    for number, (image, table) in enumerate(zip(stack, tables, strict=True)):
        found[number] = cv2.LUT(image, table.reshape(1, 256, -1)).reshape(image.shape)
    return found


def brightness(stack: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blends with black."""
    return _toward(stack, np.zeros(len(stack)), factor)


def contrast(stack: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blends with the mean of the luma, rounded."""
    means = grey(stack).reshape(len(stack), -1).mean(axis=1, dtype=np.float64)
    return _toward(stack, np.floor(means + 0.5), factor)


def saturation(stack: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blends with the luma."""
    return stack if stack.shape[-1] == 1 else blend(grey(stack), stack, factor)


def sharpness(stack: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blends with the image smoothed by the kernel (1 1 1, 1 5 1, 1 1 1) / 13; its border stays."""
    if min(stack.shape[1:3]) < 3:
        return stack
    import cv2

    kernel, smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32), stack.copy()
    for image, made in zip(stack, smooth, strict=True):
        total = cv2.filter2D(image, cv2.CV_32F, kernel).reshape(image.shape)[1:-1, 1:-1]
        made[1:-1, 1:-1] = (total + 6.5) * np.float32(1 / 13)  # cut to whole numbers; none is nearer to one than 1 / 26
    return blend(smooth, stack, factor)


def hue(stack: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Turns the colours of image i by turn[i] of the circle, [n] in [-1/2, 1/2]; hues have 256 values."""
    import cv2

    if stack.shape[-1] == 1:
        return stack
    found = np.empty_like(stack)
    for number, (image, by) in enumerate(zip(stack, turn, strict=True)):
        turned = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV_FULL)
        turned[..., 0] += np.uint8(int(by * 255) % 256)
        found[number] = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL)
    return found


def posterize(stack: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the first `bits` of eight."""
    return stack & np.uint8(256 - 2 ** (8 - bits))


def solarize(stack: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts values of the threshold and above."""
    values = np.arange(256)
    return mapped(stack, np.where(values < threshold, values, 255 - values).astype(np.uint8)[None])


def autocontrast(stack: np.ndarray) -> np.ndarray:
    """Stretches each channel of each image to 0..255."""
    present = _histograms(stack) > 0  # [n, 256, C]
    low, high = np.argmax(present, axis=1), 255 - np.argmax(present[:, ::-1], axis=1)
    scale = 255.0 / np.maximum(high - low, 1)
    values = np.arange(256)[None, :, None]
    tables = np.clip(np.trunc(values * scale[:, None] + (-low * scale)[:, None]), 0, 255)
    return mapped(stack, np.where((high > low)[:, None], tables, values).astype(np.uint8))


def equalize(stack: np.ndarray) -> np.ndarray:
    """Brings the values of each channel of each image to be equally often, as `ImageOps.equalize`."""
    counts = _histograms(stack)
    last = 255 - np.argmax((counts > 0)[:, ::-1], axis=1)
    step = (counts.sum(axis=1) - np.take_along_axis(counts, last[:, None], axis=1)[:, 0]) // 255
    below = np.cumsum(counts, axis=1) - counts
    tables = np.clip((step // 2)[:, None] + below, 0, None) // np.maximum(step, 1)[:, None]
    values = np.arange(256)[None, :, None]
    return mapped(stack, np.where((step > 0)[:, None], np.minimum(tables, 255), values).astype(np.uint8))


def moved(stack: np.ndarray, matrix: Matrix, fill: int = 0) -> np.ndarray:
    """Returns images whose pixel (x, y) is the nearest one to (a x + b y + c, d x + e y + f), or `fill` outside.

    As Pillow's `transform(size, AFFINE, matrix, NEAREST)`, which counts in 1/65536 of a pixel.

    Args:
      stack: the images.
      matrix: (a, b, c, d, e, f).
      fill: of what lies outside.
    """
    import cv2

    places: Any = _places(stack.shape[1], stack.shape[2], matrix)
    whole: Any = None  # no second map: places are whole numbers
    options = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": (float(fill),) * 4}
    found = np.empty_like(stack)
    for number, image in enumerate(stack):
        found[number] = cv2.remap(image, places, whole, cv2.INTER_NEAREST, **options).reshape(image.shape)
    return found


@functools.lru_cache(maxsize=256)
def _places(height: int, width: int, matrix: Matrix) -> np.ndarray:
    """Of which pixel (x, y) each one is taken, int16 [H, W, 2]; -1 and below, or beyond the sides, of none."""
    a, b, c, d, e, f = matrix
    middle = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)  # of the first pixel
    a, b, c, d, e, f = (int(np.floor(value * 65536 + 0.5)) for value in middle)
    y, x = np.mgrid[:height, :width]
    places = np.stack([(a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16], axis=2)
    return np.clip(places, -1, 2**15 - 1).astype(np.int16)


def _toward(stack: np.ndarray, value: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blends image i with the plain colour value[i]."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1)
    others = value.astype(np.uint8).reshape(-1, 1, 1, 1)
    factor = np.broadcast_to(np.asarray(factor, np.float32), len(stack))
    return mapped(stack, blend(others, np.broadcast_to(values, (len(stack), 256, 1, 1)), factor)[..., 0])


def _histograms(stack: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel of each image, [n, 256, C]."""
    import cv2

    counts = [
        [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(stack.shape[-1])]
        for image in stack
    ]
    return np.array(counts).astype(np.int64).transpose(0, 2, 1)
