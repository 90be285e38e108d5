"""RandAugment: some changes of many, drawn for each image, all of one strength."""

import math
from collections.abc import Callable

import numpy as np

from jaxtransfer.data import pixels
from jaxtransfer.data.transform import bytes_of, draw_for, per_example
from jaxtransfer.errors import InputError

_BINS = 31
Change = Callable[[np.ndarray, float], np.ndarray]  # of a stack [n, H, W, C] and a strength in [-1, 1]


def rand_augment(count: int = 2, magnitude: int = 9, *, fill: int = 0):
    """Applies `count` changes to each image, each drawn anew of fourteen (Cubuk et al. 2020, arXiv:1909.13719).

    torchvision's `RandAugment`, in the same strengths: identity; shear of x and of y, up to 0.3; translation of x and
    of y, up to 150/331 of the side; rotation, up to 30 degrees; brightness, colour, contrast and sharpness, a factor
    of 1 +- 0.9 at most; posterize, down to 4 bits; solarize; autocontrast; equalize. What has a sign gets either one.
    Each is Pillow's, moved pixels are the nearest ones.

    Args:
      count: N, changes one after the other, at least 1; one may be drawn twice.
      magnitude: M, the strength, a whole number in 0..30.
      fill: of what lies outside after a movement, in 0..255.

    Returns:
      The transform, of uint8 images, grey or RGB.
    """
    if count < 1 or not 0 <= magnitude < _BINS or int(magnitude) != magnitude:
        raise InputError(
            f"rand_augment needs a count of at least 1 and a whole magnitude in 0..{_BINS - 1}, got {count} and "
            f"{magnitude}"
        )
    if not 0 <= fill <= 255:
        raise InputError(f"rand_augment fills with a value in 0..255, got {fill}")
    changes = _changes(int(fill))
    strength = magnitude / (_BINS - 1)

    @per_example
    def transform(batch, rng, rows=None):
        image = bytes_of(batch, "rand_augment", (1, 3))
        drawn = draw_for(batch, rows, lambda total: rng.integers(0, 2 * len(changes), (total, count)))
        for turn in range(count):
            order = np.argsort(drawn[:, turn], kind="stable")  # images of one change and sign go together
            kinds, starts = np.unique(drawn[order, turn], return_index=True)
            for kind, chosen in zip(kinds.tolist(), np.split(order, starts[1:]), strict=True):
                change = changes[kind // 2]
                if change is not None:
                    image[chosen] = change(image[chosen], strength if kind % 2 else -strength)
        return {**batch, "image": image}

    return transform


def _changes(fill: int) -> tuple[Change | None, ...]:
    def move(matrix: Callable[[float, int, int], pixels.Matrix]) -> Change:
        return lambda stack, s: pixels.moved(stack, matrix(s, stack.shape[1], stack.shape[2]), fill)

    def blended(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Change:
        return lambda stack, s: change(stack, np.full(len(stack), 1 + 0.9 * s))

    return (
        None,
        move(lambda s, height, width: (1.0, 0.3 * s, 0.0, 0.0, 1.0, 0.0)),
        move(lambda s, height, width: (1.0, 0.0, 0.0, 0.3 * s, 1.0, 0.0)),
        move(lambda s, height, width: (1.0, 0.0, -float(int(150 / 331 * width * s)), 0.0, 1.0, 0.0)),
        move(lambda s, height, width: (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(150 / 331 * height * s)))),
        move(_rotation),
        blended(pixels.brightness),
        blended(pixels.saturation),
        blended(pixels.contrast),
        blended(pixels.sharpness),
        lambda stack, s: pixels.posterize(stack, 8 - round(4 * abs(s))),
        lambda stack, s: pixels.solarize(stack, 255 * (1 - abs(s))),
        lambda stack, s: pixels.autocontrast(stack),
        lambda stack, s: pixels.equalize(stack),
    )


def _rotation(s: float, height: int, width: int) -> pixels.Matrix:
    """By 30 s degrees against the clock around the middle, as `Image.rotate`."""
    angle = -math.radians((30 * s) % 360)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y
