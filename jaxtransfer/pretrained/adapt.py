"""Weights brought to another size: positions of another grid, a stem for other channels, a head for other classes."""

from collections.abc import Sequence

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.pretrained.resample import resample


def square(value: np.ndarray) -> tuple[int, int]:
    """Returns the (rows, columns) of a position embedding [1, 1 + M, D] whose M patches are a square.

    Args:
      value: the embedding.

    Raises:
      InputError: where M is no square.
    """
    side = round((value.shape[1] - 1) ** 0.5)
    if side * side != value.shape[1] - 1:
        raise InputError(f"positions of {value.shape[1]} tokens are no class token and a square of patches")
    return side, side


def positions(value: np.ndarray, grid: tuple[int, int], old: tuple[int, int]) -> np.ndarray:
    """Returns the position embedding [1, 1 + M, D] of a class token and a grid of M patches for another grid.

    Bicubic, widened as it shrinks, as timm does it; the class token's stays.

    Args:
      value: the embedding.
      grid: (rows, columns) of patches that are wanted.
      old: those that it is of.
    """
    token, patches = value[:, :1].astype(np.float64), value[0, 1:].astype(np.float64)
    moved = resample(patches.reshape(*old, -1), grid).reshape(1, grid[0] * grid[1], -1)
    return np.concatenate([token, moved], axis=1)


def stem(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Returns a first kernel [h, w, 3, O] for images of other channels.

    For one channel the three are added up. For more, they are repeated in order, and copies of one share its weight. An
    image whose channels are equal gives what it gave as three equal ones. For two, the first two are kept, 3/2 as
    large, so that maps stay about as large as they were. For 1, 2, 3, 6, 9 ... channels it is what timm does, which for
    others scales all of them alike.

    Args:
      kernel: the kernel.
      channels: how many are wanted.
    """
    kernel = kernel.astype(np.float64)
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(2, keepdims=True)
    origin = np.arange(channels) % old
    return kernel[:, :, origin] / np.bincount(origin)[origin][None, None, :, None] * max(1, old / channels)


def channelwise(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Returns means or deviations of three channels for as many as the stem was brought to.

    Args:
      values: one per channel.
      channels: how many are wanted.
    """
    if channels == 1:
        return (float(np.mean(values)),)
    return tuple(values[number % len(values)] for number in range(channels))


def rows_by_name(wanted: Sequence[str], there: Sequence[str]) -> list[int | None]:
    """Returns for each class that is wanted its number among those that are there, or None.

    Names are compared without regard to case, spaces and underscores; of several names with commas between them, as
    ImageNet has, each counts.

    Args:
      wanted: names of the model's classes.
      there: names of the weights' classes.

    Raises:
      InputError: where the two have no name in common, or a name is that of two classes.
    """
    numbers: dict[str, set[int]] = {}
    for number, names in enumerate(there):
        for name in {_plain(names), *map(_plain, names.split(","))}:
            numbers.setdefault(name, set()).add(number)
    found = [numbers.get(_plain(name), set()) for name in wanted]
    if double := next((name for name, of in zip(wanted, found, strict=True) if len(of) > 1), None):
        raise InputError(f"the class {double!r} is the name of several classes of the weights; rename it")
    if not any(found):
        raise InputError(
            f"no class of the model is among those of the weights: {', '.join(wanted[:3])} ... and "
            f"{', '.join(there[:3])} ...; start the head afresh, reinit='head'"
        )
    return [next(iter(of), None) for of in found]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
