"""Options that several commands share, and how they become data, optimisers and augmentations."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro

from jaxtransfer import data as data_room
from jaxtransfer.data import augment
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded

AUGMENTATIONS = {
    "crop": lambda classes: augment.random_crop(4),
    "flip": lambda classes: augment.random_flip(),
    "cutout": lambda classes: augment.cutout(8),
    "mixup": lambda classes: augment.mixup(0.2, classes),
}
MODES = ("jit", "pmap")
OPTIMIZERS = {
    "adam": lambda rate, decay: optax.adamw(rate, weight_decay=decay) if decay else optax.adam(rate),
    "sgd": lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay) if decay else optax.identity(), optax.sgd(rate, momentum=0.9, nesterov=True)
    ),
}


DataDir = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: $TFDS_DATA_DIR)")]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to learn from."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """digits/upright (offline), folder:PATH (class folders) or a name of tfds; `jaxtransfer datasets` lists some."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split to train on; slices such as train[:90%] work."""
    eval_split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "test"
    """Split to evaluate on."""
    shots: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None
    """Examples per class to train on, chosen by --seed."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How to learn, and where to keep what was learned."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Run directory for checkpoints, metrics and a report. The same command again resumes, or says that it is done."""
    steps: int = 1000
    """Updates in all."""
    optimizer: Annotated[str, tyro.conf.arg(metavar="NAME")] = "adam"
    """adam, or sgd with Nesterov momentum 0.9."""
    lr: float = 1e-3
    """Peak learning rate; it falls to zero along a cosine."""
    weight_decay: float = 0.0
    """Weight decay: decoupled under adam, added to the gradient under sgd."""
    seed: int = 0
    """Of weights, order, augmentation and choice of shots."""
    eval_every: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: a tenth of --steps)")
    ] = None
    """Steps between evaluations, each with a checkpoint."""
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    patience: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: never)")] = None
    """Stop after this many evaluations without a better accuracy."""
    mode: Annotated[str, tyro.conf.arg(metavar="NAME")] = "jit"
    """jit or pmap, over all devices; the numbers are the same to rounding."""

    def optimizer_for(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimiser with a cosine schedule over `steps`."""
        return OPTIMIZERS[self.optimizer](optax.cosine_decay_schedule(self.lr, max(1, steps)), self.weight_decay)

    def check(self) -> None:
        """Raises for values that no run can have, before anything is loaded."""
        for name, known in (("optimizer", OPTIMIZERS), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        at_least(self, 1, "steps", "keep", "eval_every", "patience")
        at_least(self, 0, "weight_decay", "seed")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"--lr must be positive and finite; got {self.lr}")
        if self.seed >= 2**32:
            raise InputError(f"--seed must be below 2**32; got {self.seed}")


@dataclasses.dataclass(frozen=True)
class TrainOptions(RunOptions):
    """How to learn, and where to keep what was learned."""

    batch_size: int = 128
    """Examples per update, over all devices; a multiple of their number."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes."""
    augment: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: none)")] = ()
    """Any of crop, flip, cutout, mixup, in the order of use."""

    def pipeline(self, dataset: data_room.Dataset) -> data_room.Pipeline:
        """Returns the training batches."""
        transforms = [AUGMENTATIONS[name](dataset.classes) for name in self.augment]
        transform = augment.compose(*transforms) if transforms else None
        return data_room.pipeline(dataset, self.batch_size, seed=self.seed, augment=transform)

    def check(self) -> None:
        """Raises for values that no run can have, before anything is loaded."""
        super().check()
        for name in self.augment:
            if name not in AUGMENTATIONS:
                raise unknown("augmentation", name, AUGMENTATIONS)
        at_least(self, 1, "batch_size")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"--label-smoothing must be at least 0 and below 1; got {self.label_smoothing}")
        divides_by_devices("batch_size", self.batch_size)


def divides_by_devices(name: str, value: int) -> None:
    """Raises for a number of rows that the devices can't share."""
    if value % (count := jax.device_count()):
        raise InputError(f"--{name.replace('_', '-')} must be a multiple of the {count} devices; got {value}")


def at_least(options: Any, least: float, *names: str) -> None:
    """Raises for an option that is set and smaller than `least`, or not finite."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")


def config_of(command: str, *options: Any, **more: Any) -> dict[str, Any]:
    """Returns what determines a run as JSON types: the options, but for where things lie."""
    config: dict[str, Any] = {"command": command}
    for option in options:
        config |= {k: v for k, v in dataclasses.asdict(option).items() if k not in ("out", "data_dir")}
    return {k: str(v) if isinstance(v, Path) else v for k, v in {**config, **more}.items()}


def load_pair(
    data: DataOptions,
    image_shape: tuple | None = None,
    seed: int = 0,
    prepare: Callable[[data_room.Dataset], data_room.Dataset] = lambda train: train,
):
    """Returns the training and the evaluation data set, which must have the same classes.

    What `prepare` does to the whole training split is done before --shots chooses from it.
    """
    at_least(data, 1, "shots")
    check_folder(data.data_dir)
    sets = [
        data_room.load(data.data, split, data_dir=data.data_dir, image_shape=image_shape)
        for split in (data.split, data.eval_split)
    ]
    if sets[0].class_names != sets[1].class_names:
        raise InputError(
            f"{data.data}: splits {data.split!r} and {data.eval_split!r} have different classes "
            f"({sets[0].classes} and {sets[1].classes})"
        )
    sets[0] = prepare(sets[0])
    if data.shots is not None:
        sets[0] = sets[0].subset(per_class=data.shots, seed=seed)
    return sets


def check_folder(data_dir: Path | None) -> None:
    """Raises where --data-dir names no folder."""
    if data_dir is not None and not expanded(data_dir).is_dir():
        raise InputError(f"--data-dir: expected the folder of prepared tfds data sets; there is no folder {data_dir}")


def statistics(dataset: data_room.Dataset, most: int = 10_000) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation per channel of up to `most` images in [0, 1], to normalise by."""
    rows = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int)
    images = dataset.read(rows)["image"].astype(np.float64) / 255
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    return [round(float(m), 4) for m in mean], [round(max(float(s), 1e-3), 4) for s in std]
