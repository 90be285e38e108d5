"""Images as uint8 arrays [H, W, C]: decoding files; `resizing` brings them to one shape."""

import os
from typing import Any

import numpy as np

from jaxtransfer.data import image_header
from jaxtransfer.errors import InputError
from jaxtransfer.files import read_bytes
from jaxtransfer.resizing import fit as fit
from jaxtransfer.resizing import fit_mask as fit_mask

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".avif"),
)
"""What names of image files end in, in lower case."""
MOST_PIXELS = 2**27
"""Images of more pixels (134 million) are not decoded: a file of some kilobytes may say that it holds gigabytes."""


def check_shape(image_shape) -> tuple[int, int, int]:
    """Returns `image_shape` as a tuple of ints.

    Args:
      image_shape: (H, W, C) with H, W >= 1 pixels and C of 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Returns:
      The tuple (H, W, C).

    Raises:
      InputError: for anything else, and for more than `MOST_PIXELS` pixels.
    """
    try:
        shape = tuple(int(size) for size in image_shape)
    except (TypeError, ValueError):
        shape = ()
    if len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3, 4):
        raise InputError(
            f"image_shape must be (height, width, channels) with 1 or 3 channels, got {image_shape!r}; "
            "e.g. image_shape=(32, 32, 3), or (32, 32, 4) for images with alpha"
        )
    if shape[0] * shape[1] > MOST_PIXELS:
        raise InputError(f"image_shape must have at most {MOST_PIXELS:,} pixels, got {shape}; choose a smaller one")
    return shape


def read(path, channels: int = 3) -> np.ndarray:
    """Decodes an image file as it is meant to be seen: turned as its EXIF orientation says, 16 bits brought to 8.

    Args:
      path: a file of one of the kinds in `SUFFIXES`, whatever its name; of several frames the first one.
      channels: 3, or 4 for the alpha channel too, which is 255 where the file has none.

    Returns:
      uint8 [H, W, channels], RGB first; a grey file has three equal channels.

    Raises:
      InputError: names a file that does not decode, is cut off, no file at all but a pipe, say, or has more than
        `MOST_PIXELS` pixels.
    """
    import cv2

    path, image, data = os.fspath(path), None, b""
    try:
        data = read_bytes(path)
        size = image_header.size_of(data)
        if size is not None and size[0] * size[1] > MOST_PIXELS:
            raise InputError(
                f"the image {shown(path)} says that it has {size[0]} x {size[1]} pixels, expected at most "
                f"{MOST_PIXELS:,} in all; make it smaller"
            )
        if size is not None:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        reason = (
            "it is corrupt" if size is not None else "it is empty" if not data else "it is no image of a known kind"
        )
    except OSError as error:
        reason = error.strerror
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        reason = str(error)
    except cv2.error:
        reason = "it is corrupt"
    if image is None:
        raise InputError(f"cannot decode the image {shown(path)}: {reason}; mend or remove it")
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if channels == 3:
        return image
    whole: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    alpha = np.full(image.shape[:2], 255, np.uint8)
    if whole is not None and whole.ndim == 3 and whole.shape[2] == 4 and whole.shape[:2] == image.shape[:2]:
        alpha = whole[:, :, 3] if whole.dtype == np.uint8 else (whole[:, :, 3] >> 8).astype(np.uint8)
    return np.concatenate([image, alpha[:, :, None]], axis=2)


def shown(path) -> str:
    """Returns a path for a message, with escapes for bytes that are no UTF-8, and for halves of characters."""
    text = os.fsdecode(path)
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
