"""Warps and holes for views: images turned, sheared, scaled, moved, and squares cut out, on the device."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError

Transform = Callable[[jax.Array, jax.Array], jax.Array]


def affine(
    *, degrees: float = 0.0, translate: float = 0.0, scale: tuple[float, float] = (1.0, 1.0), shear: float = 0.0
) -> Transform:
    """Turns, shears, scales and moves an image at random, about its middle, by bilinear interpolation; 0 outside.

    Each is uniform: the angle in ± `degrees`, a shift along either axis in ± `translate` of its side, the factor in
    `scale`, the angle of a horizontal shear in ± `shear` degrees. It is for images in which a class stays what it is
    when they are turned a little: digits, letters.

    Args:
      degrees: at most 180.
      translate: a share of the side, at most 1.
      scale: the smallest and the largest factor, positive.
      shear: degrees, below 90.

    Raises:
      InputError: for a range that is none.
    """
    if not (0 <= degrees <= 180 and 0 <= translate <= 1 and 0 < scale[0] <= scale[1] < math.inf and 0 <= shear < 90):
        raise InputError(
            f"affine takes degrees in [0, 180], translate in [0, 1], 0 < scale, (least, most), and a shear in [0, 90); "
            f"got {degrees}, {translate}, {scale} and {shear}"
        )

    def transform(key, image):
        height, width = image.shape[:2]
        turn, place, size, lean = jax.random.split(key, 4)
        angle = jnp.deg2rad(jax.random.uniform(turn, minval=-degrees, maxval=degrees))
        slope = jnp.tan(jnp.deg2rad(jax.random.uniform(lean, minval=-shear, maxval=shear)))
        factor = jax.random.uniform(size, minval=scale[0], maxval=scale[1])
        shift = jax.random.uniform(place, (2,), minval=-translate, maxval=translate) * jnp.array([height, width])
        middle = jnp.array([height - 1, width - 1]) / 2
        # Where each pixel of the result comes from: back by the shift, the turn, the shear and the scale.
        y = jnp.arange(height)[:, None] - middle[0] - shift[0]
        x = jnp.arange(width)[None] - middle[1] - shift[1]
        back_y = (jnp.cos(angle) * y - jnp.sin(angle) * x) / factor
        back_x = (jnp.sin(angle) * y + jnp.cos(angle) * x) / factor - slope * back_y
        return _sampled(image, back_y + middle[0], back_x + middle[1])

    return transform


def cutout(size: int) -> Transform:
    """Sets a square of `size` pixels around a random place to 0 (DeVries & Taylor 2017, arXiv:1708.04552).

    The middle is uniform over the image; what sticks out of it is cut off.

    Args:
      size: side of the square, at least 1.

    Raises:
      InputError: for a size below 1.
    """
    if size < 1:
        raise InputError(f"cutout needs a size of at least 1 pixel, got {size}")

    def transform(key, image):
        height, width = image.shape[:2]
        start = jax.random.randint(key, (2,), 0, jnp.array([height, width])) - size // 2
        rows, columns = jnp.arange(height) - start[0], jnp.arange(width) - start[1]
        hole = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None]
        return jnp.where(hole[..., None], 0, image)

    return transform


def _sampled(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the image [H, W, C] at real places y and x [h, w], 0 outside, by bilinear interpolation."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((1, 2), (1, 2), (0, 0)))  # all that is outside reads zeros
    y, x = jnp.clip(y, -1, height) + 1, jnp.clip(x, -1, width) + 1
    top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    down, right = (y - top)[..., None].astype(image.dtype), (x - left)[..., None].astype(image.dtype)

    def row(y):
        return padded[y, left] * (1 - right) + padded[y, left + 1] * right

    return row(top) * (1 - down) + row(top + 1) * down
