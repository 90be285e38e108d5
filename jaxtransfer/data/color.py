"""Colours changed at random."""

import numpy as np

from jaxtransfer.data import pixels
from jaxtransfer.data.transform import bytes_of, draw_for, per_example
from jaxtransfer.errors import InputError


def color_jitter(brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1):
    """Changes brightness, contrast, saturation and hue of each image, in an order drawn for each.

    torchvision's `ColorJitter`: factors are uniform in [max(0, 1 - b), 1 + b], the hue turns by a share of the circle
    uniform in [-hue, hue]. All but the hue, which is OpenCV's, are Pillow's own; grey images have the first two alone.

    Args:
      brightness: b of the brightness, at least 0, where it stays.
      contrast: likewise.
      saturation: likewise.
      hue: in [0, 1/2].

    Returns:
      The transform, of uint8 images.
    """
    given = np.array([brightness, contrast, saturation, hue], float)
    if not (np.isfinite(given).all() and (given >= 0).all() and hue <= 0.5):
        raise InputError(f"color_jitter needs finite numbers of at least 0, the hue at most 0.5; got {given.tolist()}")
    changes = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)
    low, high = np.append(np.maximum(0, 1 - given[:3]), -hue), np.append(1 + given[:3], hue)

    @per_example
    def transform(batch, rng, rows=None):
        image = bytes_of(batch, "color_jitter", (1, 3))
        drawn = draw_for(batch, rows, lambda total: rng.random((total, 2, 4)))
        factors, orders = low + (high - low) * drawn[:, 0], np.argsort(drawn[:, 1], axis=1)
        for turn in range(4):
            for number, change in enumerate(changes):
                chosen = np.flatnonzero(orders[:, turn] == number)
                if given[number] and len(chosen):
                    image[chosen] = change(image[chosen], factors[chosen, number])
        return {**batch, "image": image}

    return transform
