"""Resampling with filters that widen as an image shrinks: Pillow's, and PyTorch's with `antialias=True`."""

import numpy as np

from jaxtransfer.errors import unknown


def bilinear(x: np.ndarray) -> np.ndarray:
    """Returns the triangle max(0, 1 − |x|)."""
    return np.maximum(0, 1 - np.abs(x))


def bicubic(x: np.ndarray) -> np.ndarray:
    """Returns Keys's cubic (1981) with a = −1/2."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


FILTERS = {"bilinear": bilinear, "bicubic": bicubic}


def weights(old: int, new: int, method: str) -> np.ndarray:
    """Returns the matrix [new, old] that resamples `old` values into `new` ones; its rows sum to one.

    Args:
      old: number of values that are there.
      new: number of values that are wanted.
      method: a key of `FILTERS`.
    """
    if method not in FILTERS:
        raise unknown("interpolation", method, FILTERS)
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    rows = FILTERS[method]((np.arange(old)[None, :] + 0.5 - centres) / max(scale, 1.0))
    return rows / rows.sum(1, keepdims=True)


def resample(x: np.ndarray, shape: tuple[int, int], method: str = "bicubic") -> np.ndarray:
    """Returns `x` [H, W, ...] resampled to [*shape, ...], along W and then along H.

    Args:
      x: values; uint8 is rounded and kept within 0 and 255 after each of the two, as Pillow does; others are computed
        in float64.
      shape: the wanted (H, W).
      method: "bilinear" or "bicubic".
    """
    for axis in (1, 0):
        if x.shape[axis] != shape[axis]:
            matrix = weights(x.shape[axis], shape[axis], method)
            y = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
            x = np.clip(np.floor(y + 0.5), 0, 255).astype(np.uint8) if x.dtype == np.uint8 else y
    return x
