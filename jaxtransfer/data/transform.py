"""What transforms of whole batches share: which rows they get, and draws that are those of the global batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.errors import InputError


class Rows(NamedTuple):
    """Rows `start` to `stop` of a global batch of `total` examples."""

    start: int
    stop: int
    total: int


def images_of(batch: Any) -> Any:
    """Returns the images of a batch."""
    if "image" not in batch:
        raise InputError(
            f"this transform changes images, batch['image'], and the batch has {', '.join(sorted(batch))}; leave it "
            "out, or write one: (batch, rng) -> batch"
        )
    return batch["image"]


def bytes_of(batch: Any, name: str, channels: tuple[int, ...] = (1, 3, 4)) -> np.ndarray:
    """Returns a copy of the images of a batch, uint8 [B, H, W, C], for a transform of that name.

    Raises:
      InputError: for floats, which come after it, and other channels.
    """
    image = images_of(batch)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[-1] not in channels:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else "images of several sizes"
        raise InputError(
            f"{name} changes images uint8 [B, H, W, C] with C in {channels}, got {got}; put it before what makes "
            f"floats, such as normalize and mixup, and after what brings images to one size"
        )
    return image.copy()


def draw_for(batch: Any, rows: Rows | None, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns the part of `draw(total)` that belongs to the rows of the batch."""
    rows = rows or Rows(0, len(batch["image"]), len(batch["image"]))
    return draw(rows.total)[rows.start : rows.stop]


def per_example(transform: Any, holds: bool = True) -> Any:
    """Marks a transform as one that changes each example by itself, so that hosts make their own rows alone."""
    transform.per_example = holds
    return transform


def span(name: str, values: Any, least: float, most: float = np.inf) -> tuple[float, float]:
    """Returns a range (low, high) of numbers above `least` and at most `most`.

    Raises:
      InputError: for what is none.
    """
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        low, high = np.nan, np.nan
    if not least < low <= high <= most or not np.isfinite(high):
        bound = f" and at most {most:g}" if np.isfinite(most) else ""
        raise InputError(f"{name} is a range (low, high) of numbers above {least:g}{bound}, got {values!r}")
    return low, high
