"""Images as uint8 arrays [H, W, C]: decoding files, resizing, grey and colour."""

import cv2
import numpy as np

from jaxtransfer.errors import InputError


def check_shape(image_shape) -> tuple[int, int, int]:
    """Returns `image_shape` as a tuple of ints.

    Args:
      image_shape: (H, W, C) with H, W >= 1 pixels and C of 1 (grey) or 3 (RGB).

    Returns:
      The tuple (H, W, C).

    Raises:
      InputError: for anything else.
    """
    try:
        shape = tuple(int(size) for size in image_shape)
    except (TypeError, ValueError):
        shape = ()
    if len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3):
        raise InputError(
            f"image_shape must be (height, width, channels) with 1 or 3 channels, got {image_shape!r}; "
            "e.g. image_shape=(32, 32, 3)"
        )
    return shape


def fit(image: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Resizes and converts an image to `image_shape`.

    Shrinking averages over pixel areas, enlarging is bilinear. Grey to RGB repeats the channel; RGB to grey
    takes the luma (0.299, 0.587, 0.114); an alpha channel is dropped.

    Args:
      image: uint8 [h, w, c] with c of 1, 3 or 4.
      image_shape: the wanted (H, W, C), C of 1 or 3.

    Returns:
      uint8 [H, W, C].
    """
    height, width, channels = image_shape
    if image.shape[2] == 4:
        image = image[:, :, :3]
    if image.shape[2] == 3 and channels == 1:
        image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)[:, :, None]
    if image.shape[:2] != (height, width):
        shrinks = height < image.shape[0] or width < image.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=method)
        image = image.reshape(height, width, -1)
    if image.shape[2] == 1 and channels == 3:
        image = np.repeat(image, 3, axis=2)
    return image


def read(path) -> np.ndarray:
    """Decodes an image file.

    Args:
      path: a PNG, JPEG, BMP or WebP file.

    Returns:
      uint8 [H, W, 3] in RGB order; a grey file has three equal channels.

    Raises:
      InputError: names a file that does not decode.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error):
        image = None
    if image is None:
        raise InputError(f"cannot decode the image {path}: it is corrupt or no image; mend or remove it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
