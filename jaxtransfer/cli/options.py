"""Options that several commands share, and how they become data, optimisers and augmentations."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optax
import tyro

from jaxtransfer import data as data_room
from jaxtransfer.data import augment
from jaxtransfer.errors import InputError, unknown

AUGMENTATIONS = {
    "crop": lambda classes: augment.random_crop(4),
    "flip": lambda classes: augment.random_flip(),
    "cutout": lambda classes: augment.cutout(8),
    "mixup": lambda classes: augment.mixup(0.2, classes),
}
OPTIMIZERS = {
    "adam": lambda rate, decay: optax.adamw(rate, weight_decay=decay) if decay else optax.adam(rate),
    "sgd": lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay) if decay else optax.identity(), optax.sgd(rate, momentum=0.9, nesterov=True)
    ),
}


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which data."""

    data: str
    """Data set: digits/upright (offline), folder:PATH, or any name of tfds; `jaxtransfer datasets` lists them."""
    split: str = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: str = "test"
    """Split to evaluate on."""
    shots: int | None = None
    """Labels per class to train on, chosen by --seed; all when left out."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How to train."""

    out: Path
    """Run directory. The same command again resumes there, or says that it is done."""
    steps: int = 1000
    """Updates in all."""
    batch_size: int = 128
    """Examples per update, over all devices."""
    optimizer: str = "adam"
    """adam or sgd (momentum 0.9)."""
    lr: float = 1e-3
    """Peak learning rate; it falls to zero along a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""
    augment: tuple[str, ...] = ()
    """Any of crop, flip, cutout, mixup."""
    seed: int = 0
    """Of weights, order, augmentation and choice of shots."""
    eval_every: int | None = None
    """Steps between evaluations and checkpoints; ten in all by default."""
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    patience: int | None = None
    """Stop after this many evaluations without a better accuracy."""
    mode: str = "jit"
    """jit over all devices, or pmap."""

    def optimizer_for(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimiser with a cosine schedule over `steps`."""
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        return OPTIMIZERS[self.optimizer](optax.cosine_decay_schedule(self.lr, max(1, steps)), self.weight_decay)

    def pipeline(self, dataset: data_room.Dataset) -> data_room.Pipeline:
        """Returns the training batches."""
        for name in self.augment:
            if name not in AUGMENTATIONS:
                raise unknown("augmentation", name, AUGMENTATIONS)
        transforms = [AUGMENTATIONS[name](dataset.classes) for name in self.augment]
        transform = augment.compose(*transforms) if transforms else None
        return data_room.pipeline(dataset, self.batch_size, seed=self.seed, augment=transform)

    def check(self) -> None:
        """Raises for values that no run can have, before anything is loaded."""
        for name in ("steps", "batch_size", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"--lr must be positive; got {self.lr}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"--label-smoothing must be in [0, 1); got {self.label_smoothing}")


Data = Annotated[DataOptions, tyro.conf.arg(name="")]
Training = Annotated[TrainOptions, tyro.conf.arg(name="")]


def config_of(command: str, *options: Any, **more: Any) -> dict[str, Any]:
    """Returns what determines a run as JSON types: the options, but for where things lie."""
    config: dict[str, Any] = {"command": command}
    for option in options:
        config |= {k: v for k, v in dataclasses.asdict(option).items() if k not in ("out", "data_dir")}
    return {k: str(v) if isinstance(v, Path) else v for k, v in {**config, **more}.items()}


def load_pair(data: DataOptions, image_shape: tuple | None = None, seed: int = 0):
    """Returns the training and the evaluation data set, which must have the same classes."""
    sets = [
        data_room.load(data.data, split, data_dir=data.data_dir, image_shape=image_shape)
        for split in (data.split, data.eval_split)
    ]
    if sets[0].class_names != sets[1].class_names:
        raise InputError(
            f"{data.data}: splits {data.split!r} and {data.eval_split!r} have different classes "
            f"({sets[0].classes} and {sets[1].classes})"
        )
    if data.shots is not None:
        sets[0] = sets[0].subset(per_class=data.shots, seed=seed)
    return sets


def statistics(dataset: data_room.Dataset, most: int = 10_000) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation per channel of up to `most` images in [0, 1], to normalise by."""
    rows = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    images = dataset.read(rows)["image"].astype(np.float64) / 255
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    return [round(float(m), 4) for m in mean], [round(max(float(s), 1e-3), 4) for s in std]
