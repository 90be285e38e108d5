"""Patches of one example pasted into another, with their share of the label."""

import numpy as np

from jaxtransfer.data.transform import images_of
from jaxtransfer.errors import InputError


def cutmix(alpha: float = 1.0, classes: int | None = None):
    """Pastes a rectangle of another example of the batch into each (Yun et al. 2019, arXiv:1905.04899).

    With lambda ~ Beta(alpha, alpha) the rectangle has sides sqrt(1 - lambda) of the image's and its centre anywhere,
    so that it may be cut off at the border; labels are mixed by the share of the pixels that were pasted in the end.
    The other example is that of a permutation of the global batch; lambda is drawn for each example.

    Args:
      alpha: positive; 1 draws every area equally often.
      classes: number of classes C. None drops the labels.

    Returns:
      The transform; it leaves the type of `image` and gives, with `classes`, `label` float32 [B, C]; it needs the
      global batch.
    """
    if not 0 < alpha < np.inf or (classes is not None and classes < 1):
        raise InputError(f"cutmix needs a finite alpha > 0 and classes >= 1 or None, got {alpha} and {classes}")

    def transform(batch, rng):
        image = images_of(batch)
        size, height, width = image.shape[:3]
        cut = np.sqrt(1 - rng.beta(alpha, alpha, size))
        centre = rng.integers(0, (height, width), (size, 2))
        other = rng.permutation(size)
        half = np.stack([(height * cut).astype(int), (width * cut).astype(int)], axis=1)
        first = np.clip(centre - half // 2, 0, (height, width))
        last = np.clip(centre - half // 2 + half, 0, (height, width))
        mixed = image.copy()
        for row, ((top, left), (bottom, right)) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            mixed[row, top:bottom, left:right] = image[other[row], top:bottom, left:right]
        result = {**batch, "image": mixed}
        label = result.pop("label", None)
        if classes is None or label is None:
            return result
        pasted = (np.prod(last - first, axis=1) / (height * width)).astype(np.float32)[:, None]
        given = one_hot(label, classes, "cutmix")
        return {**result, "label": (1 - pasted) * given + pasted * given[other]}

    return transform


def one_hot(label, classes: int, name: str) -> np.ndarray:
    """Returns integer labels [B] as float32 [B, classes], for the transform of that name."""
    label = np.asarray(label)
    if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"{name} needs integer labels [B], got {label.dtype} {list(label.shape)}; mix once only")
    if label.size and not 0 <= label.min() <= label.max() < classes:
        raise InputError(f"{name}({classes=}) got labels from {label.min()} to {label.max()}; pass all classes")
    return np.eye(classes, dtype=np.float32)[label]
