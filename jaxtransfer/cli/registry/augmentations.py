"""Augmentations by the names that `--augment` takes."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtransfer.data import Dataset, augment
from jaxtransfer.errors import InputError, unknown


def _resized_crop(dataset: Dataset) -> Any:
    how = "bilinear" if dataset.resizing is None else dataset.resizing.interpolation
    return augment.random_resized_crop(dataset.image_shape[:2], interpolation=how)


AUGMENTATIONS: dict[str, Callable[[Dataset], Any]] = {
    "resized-crop": _resized_crop,
    "crop": lambda dataset: augment.random_crop(4),
    "flip": lambda dataset: augment.random_flip(),
    "rand-augment": lambda dataset: augment.rand_augment(2, 9),
    "color": lambda dataset: augment.color_jitter(),
    "erase": lambda dataset: augment.random_erasing(),
    "cutout": lambda dataset: augment.cutout(8),
    "mixup": lambda dataset: augment.mixup(0.2, dataset.classes),
    "cutmix": lambda dataset: augment.cutmix(1.0, dataset.classes),
}
MIXES = ("mixup", "cutmix")
"""Those that mix the labels of a batch, too."""
_OF_BYTES = ("rand-augment", "color")


def check_augmentations(names: Sequence[str]) -> None:
    """Raises for unknown names, and for an order in which they can't work."""
    for name in names:
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, AUGMENTATIONS)
    if "resized-crop" in names[1:]:
        raise InputError("--augment: resized-crop cuts from the images of the files; name it first, and once")
    mixed = [place for place, name in enumerate(names) if name in MIXES]
    twice = len({names[place] for place in mixed}) < len(mixed)
    if twice or (mixed and mixed[-1] - mixed[0] >= len(mixed)):
        raise InputError("--augment: mixup and cutmix stand side by side, each once; each batch gets one of them")
    for name in names[mixed[0] :] if mixed else ():
        if name in _OF_BYTES:
            raise InputError(f"--augment: {name} changes colours of whole pictures; name it before mixup and cutmix")


def augmentation(names: Sequence[str], dataset: Dataset) -> Any:
    """Returns the transform that the names stand for, in their order; None without any.

    Of mixup and cutmix each batch gets one.
    """
    made, mixes = [], [AUGMENTATIONS[name](dataset) for name in names if name in MIXES]
    for name in names:
        if name not in MIXES:
            made.append(AUGMENTATIONS[name](dataset))
        elif mixes:
            made.append(mixes[0] if len(mixes) == 1 else augment.one_of(*mixes))
            mixes = []
    return augment.compose(*made) if made else None
