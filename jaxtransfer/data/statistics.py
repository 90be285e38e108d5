"""Mean and standard deviation of the images of a data set, to normalise by."""

import math

import numpy as np

from jaxtransfer.data.dataset import Dataset

_AT_ONCE = 2**25  # values of images that statistics are taken of at a time


def statistics(dataset: Dataset, most: int = 10_000) -> tuple[list[float], list[float]]:
    """Computes mean and standard deviation per channel of images in [0, 1]: `jt.models.normalize(net, *these)`.

    Args:
      dataset: of images.
      most: how many images are read, spread evenly over the data set.

    Returns:
      The mean and the standard deviation, a number each for each channel, rounded to four digits; a channel that is
      constant has the deviation 0.001.
    """
    rows = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    channels = dataset.image_shape[2]
    sums, squares, count = np.zeros(channels), np.zeros(channels), 0  # of whole numbers, exact in float64
    for part in np.array_split(rows, -(-len(rows) * math.prod(dataset.image_shape) // _AT_ONCE)):
        pixels = dataset.read(part)["image"].reshape(-1, channels).astype(np.float64)
        sums, squares, count = sums + pixels.sum(0), squares + np.square(pixels).sum(0), count + len(pixels)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0)) / 255
    mean = mean / 255
    return [round(float(m), 4) for m in mean], [round(max(float(s), 1e-3), 4) for s in std]
